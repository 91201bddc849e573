//! A user's own service behind the gateway.

use consistency::{Epoch, Key, KeyId, KeyRing, LogId, Token};
use reqwest::Method;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use crate::{
    shop::Shops,
    world::{CREDENTIAL, DEADLINE, Gateway, Reply, eventually, position, region_config},
};

const ITEMS: &str = "/shop/items";

#[tokio::test]
async fn a_read_is_held_to_its_token_before_the_service_is_asked_and_after_it_answered() {
    let mut shops = Shops::open("").await;
    // Without a word from the service nothing is promised.
    let read = shops.world.region.get(ITEMS).await;
    assert_eq!((read.came_to(), &read.body["region"]), ((200, "unverified"), &json!("eu-west")));
    let asked = shops.region.asked();
    let token = shops.world.region.post(ITEMS, json!({})).await.token();
    let head = shops.world.region.open(&token).largest_position().get();
    let read = shops.world.region.read(ITEMS, &token, "wait;ms=1, pending").await;
    assert_eq!(read.came_to(), (202, "pending"));
    assert!(read.body["events"].as_str().unwrap().starts_with("/v1/currency/events?token="));
    assert_eq!(shops.region.asked(), asked, "memory knows better than to ask");
    shops.world.catch_up().await;
    // Memory is satisfied now, and the service itself is behind.
    shops.region.stands_at(head - 1);
    let cases = [
        ("wait;ms=1", (503, "replication-pending")),
        ("wait;ms=1, pending", (202, "pending")),
        ("wait;ms=1, eventual", (200, "stale")),
    ];
    for (policy, came_to) in cases {
        let read = shops.world.region.read(ITEMS, &token, policy).await;
        assert_eq!(read.came_to(), came_to, "{policy}: {read:?}");
        assert!(read.header("server-timing").contains("wait;dur="), "{policy}: {read:?}");
    }
    shops.primary.stands_at(head);
    shops.world.catch_up_primary().await;
    let read = shops.world.region.read(ITEMS, &token, "forward").await;
    assert_eq!((read.came_to(), &read.body["region"]), ((200, "forwarded"), &json!("us-east")));
    // Once it has caught up it is believed, and the answer shows what it read.
    shops.region.stands_at(head + 5);
    let read = shops.world.region.read(ITEMS, &token, "forward").await;
    assert_eq!((read.came_to(), &read.body["region"]), ((200, "local"), &json!("eu-west")));
    assert_eq!(shops.world.region.open(&read.token()).read_position(), position(head + 5));
    let read = shops.world.region.read(ITEMS, &token, "primary").await;
    assert_eq!((read.came_to(), &read.body["region"]), ((200, "primary"), &json!("us-east")));
}

#[tokio::test]
async fn a_read_waits_for_a_service_that_is_behind_its_region() {
    let mut shops = Shops::open("").await;
    let token = shops.world.region.post(ITEMS, json!({})).await.token();
    let head = shops.world.region.open(&token).largest_position().get();
    shops.region.stands_at(head - 1);
    shops.world.catch_up().await;
    let request = shops.world.region.request(Method::GET, ITEMS);
    let request = request.header("consistency-policy", "wait;ms=5000");
    let waiting = tokio::spawn(Reply::of(request.header("consistency-token", token)));
    eventually("it was asked", async || 1 < shops.region.asked()).await;
    shops.region.stands_at(head);
    assert_eq!(waiting.await.unwrap().came_to(), (200, "waited"));
}

#[tokio::test]
async fn a_browser_reads_its_own_writes_and_needs_no_change() {
    let mut shops = Shops::open("").await;
    let written = shops.world.region.post(ITEMS, json!({})).await;
    assert_eq!((written.status, &written.body["region"]), (201, &json!("us-east")));
    let cookies = written.headers.get_all("set-cookie").iter().map(|it| it.to_str().unwrap());
    let cookies: Vec<&str> = cookies.map(|it| it.split(';').next().unwrap()).collect();
    assert!(cookies.contains(&"cart=1"), "{cookies:?}");
    let ours = *cookies.iter().find(|cookie| cookie.starts_with("tidemark=")).unwrap();
    let wrote = shops.world.region.open(ours.trim_start_matches("tidemark="));
    assert_eq!(wrote.claims().len(), 1, "it stands for the write");
    let read = shops.world.region.request(Method::GET, ITEMS);
    let read = read.header("cookie", format!("cart=1; {ours}; a=b"));
    let behind = read.try_clone().unwrap().header("consistency-policy", "pending");
    assert_eq!(Reply::of(behind).await.came_to(), (202, "pending"), "the cookie demands it");
    let head = shops.world.catch_up().await.get();
    shops.region.stands_at(head);
    let read = Reply::of(read.header("consistency-policy", "wait;ms=5000")).await;
    assert_eq!(read.status, 200);
    assert!(read.headers.get_all("set-cookie").iter().count() == 2, "{read:?}");
    assert_eq!(shops.region.heard("cookie"), ["cart=1; a=b"], "ours ends at the gateway");
}

#[tokio::test]
async fn headers_of_connections_and_of_regions_end_at_the_gateway() {
    let shops = Shops::open("").await;
    let request = shops.world.region.request(Method::GET, ITEMS);
    let answer = Reply::of(
        request
            .header("connection", "x-mine, consistency-token")
            .header("x-mine", "1")
            .header("te", "trailers")
            .header("keep-alive", "timeout=5")
            .header("proxy-authorization", "Basic eA==")
            .header("x-kept", "1")
            .header("via", "1.1 elsewhere")
            .header("forwarded", "for=192.0.2.1")
            .header("tidemark-credential", CREDENTIAL)
            .header("tidemark-caller", "ada"),
    )
    .await;
    assert_eq!(answer.status, 200);
    let heard = |name| shops.region.heard(name);
    for gone in ["te", "keep-alive", "proxy-authorization"] {
        assert!(heard(gone).is_empty(), "{gone}");
    }
    for gone in ["x-mine", "tidemark-credential", "tidemark-caller", "tidemark-hop"] {
        assert!(heard(gone).is_empty(), "{gone}");
    }
    assert_eq!(heard("x-kept"), ["1"]);
    assert_eq!(heard("via"), ["1.1 elsewhere", "1.1 tidemark-eu-west"]);
    let host = shops.world.region.base.trim_start_matches("http://");
    let forwarded = format!("for=127.0.0.1;host=\"{host}\";proto=http");
    assert_eq!(heard("forwarded"), ["for=192.0.2.1", &forwarded]);
    assert_eq!(heard("consistency-token").len(), 1, "Connection cannot take away what we add");
    assert_eq!((answer.header("x-public"), answer.header("x-private")), ("1", ""));
    assert_eq!(answer.header("via"), "1.1 tidemark-eu-west");
    assert_eq!(answer.header("cache-control"), "private, no-cache");
    let vary: Vec<&str> =
        answer.headers.get_all("vary").iter().map(|it| it.to_str().unwrap()).collect();
    assert_eq!(vary, ["Accept", "Consistency-Token, Cookie, Consistency-Policy, Prefer"]);
    let head = Reply::of(shops.world.region.request(Method::HEAD, ITEMS)).await;
    assert_eq!((head.status, head.text.len()), (200, 0));
    assert_eq!(head.header("content-length"), answer.text.len().to_string());
    // Through the primary, each of both adds itself.
    shops.world.region.post(ITEMS, json!({})).await;
    let via = shops.primary.heard("via");
    assert_eq!(via, ["1.1 tidemark-eu-west", "1.1 tidemark-us-east"]);
    assert!(shops.primary.heard("tidemark-hop").is_empty());
}

/// Sends a request whose body comes in pieces, and answers the connection.
async fn chunked(gateway: &Gateway, path: &str) -> TcpStream {
    let address = gateway.base.trim_start_matches("http://");
    let mut stream = TcpStream::connect(address).await.unwrap();
    let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    stream
}

async fn send(stream: &mut TcpStream, piece: &str) {
    let piece = format!("{:x}\r\n{piece}\r\n", piece.len());
    stream.write_all(piece.as_bytes()).await.unwrap();
}

/// Reads until `holds` of all that came, or the end.
async fn received(stream: &mut TcpStream, holds: impl Fn(&str) -> bool) -> String {
    let mut heard = Vec::new();
    while !holds(&String::from_utf8_lossy(&heard)) {
        let mut piece = [0; 4096];
        let read = timeout(DEADLINE, stream.read(&mut piece)).await.expect("nothing comes");
        match read {
            Ok(count) if 0 < count => heard.extend_from_slice(&piece[..count]),
            Ok(_) | Err(_) => break,
        }
    }
    String::from_utf8(heard).unwrap()
}

#[tokio::test]
async fn bodies_stream_both_ways_through_both_regions() {
    let shops = Shops::open("").await;
    for gateway in [&shops.world.primary, &shops.world.region] {
        let mut stream = chunked(gateway, "/shop/echo").await;
        // Each piece comes back before the next is sent.
        for piece in ["first", "second", "third"] {
            send(&mut stream, piece).await;
            received(&mut stream, |heard| heard.contains(piece)).await;
        }
        send(&mut stream, "").await;
        received(&mut stream, |heard| heard.ends_with("0\r\n\r\n")).await;
    }
}

#[tokio::test]
async fn answers_that_nobody_reads_hold_up_nobody_else() {
    let shops = Shops::open("").await;
    let mut unread = Vec::new();
    for _ in 0..8 {
        let mut stream = chunked(&shops.world.region, "/shop/flood").await;
        send(&mut stream, "").await;
        // Its head is here, and the rest waits in every buffer on the way.
        received(&mut stream, |heard| heard.contains("200 OK")).await;
        unread.push(stream);
    }
    for _ in 0..8 {
        assert_eq!(shops.world.region.post(ITEMS, json!({})).await.status, 201);
    }
    shops.world.stock().await;
    let token = shops.world.place("o-1").await.token();
    let read = shops.world.region.read("/v1/views/order-detail/o-1", &token, "forward").await;
    assert_eq!(read.came_to(), (200, "forwarded"));
}

#[tokio::test]
async fn bodies_beyond_their_bounds_are_refused_or_broken_off() {
    let shops =
        Shops::open(", request_bytes_max = 32, answer_bytes_max = 8, pause_max = \"200ms\"").await;
    for gateway in [&shops.world.primary, &shops.world.region] {
        let large = gateway.request(Method::POST, "/shop/echo").body("x".repeat(33));
        assert_eq!(Reply::of(large).await.came_to(), (413, "too-large"));
        // One that does not say how large it is is found out on the way.
        let mut stream = chunked(gateway, "/shop/items").await;
        for _ in 0..5 {
            send(&mut stream, "sixteen letters.").await;
        }
        let heard = received(&mut stream, |heard| heard.contains("/problems/")).await;
        assert!(heard.contains("413 Payload Too Large"), "{heard}");
        let answer = gateway.request(Method::POST, "/shop/echo").body("more than eight");
        assert_eq!(Reply::of(answer).await.came_to(), (502, "upstream-answer"));
        // Nobody waits for the rest of a body for ever.
        let mut stream = chunked(gateway, "/shop/echo").await;
        send(&mut stream, "some").await;
        let heard = received(&mut stream, |_| false).await;
        assert!(heard.contains("200 OK") && !heard.ends_with("0\r\n\r\n"), "{heard}");
    }
}

#[tokio::test]
async fn what_cannot_be_passed_on_is_refused_by_name() {
    let shops = Shops::open("").await;
    let region = &shops.world.region;
    let request = || region.request(Method::GET, ITEMS);
    let cases = [
        (
            request().header("connection", "upgrade").header("upgrade", "websocket"),
            501,
            "not-supported",
        ),
        (request().header("content-type", "application/grpc+proto"), 501, "not-supported"),
        (region.request(Method::TRACE, ITEMS), 501, "not-supported"),
        (request().header("via", "1.1 a, 1.1 tidemark-eu-west"), 508, "loop-detected"),
        (region.request(Method::GET, "/shopping"), 404, "not-found"),
    ];
    let asked = shops.region.asked();
    for (request, status, problem) in cases {
        assert_eq!(Reply::of(request).await.came_to(), (status, problem));
    }
    // A path that a client would have tidied up.
    let mut dots = chunked(region, "/shop/search/%2e%2E/items").await;
    let heard = received(&mut dots, |heard| heard.contains("/problems/")).await;
    assert!(heard.contains("/problems/bad-request"), "{heard}");
    assert_eq!(shops.region.asked(), asked);
    // Who merely offers HTTP/2 in the clear is answered as he asked.
    let offered = request().header("connection", "upgrade").header("upgrade", "h2c");
    assert_eq!(Reply::of(offered).await.status, 200);
}

#[tokio::test]
async fn a_route_that_leads_back_to_its_gateway_is_found_out() {
    let shops = Shops::open("").await;
    let address = format!("127.0.0.1:{}", compose::ports::free().unwrap());
    let config = region_config(&shops.world.postgres, &shops.world.nats, &shops.world.primary.base);
    let config = config.replace("127.0.0.1:0", &address);
    let config = config.replacen(
        &format!("admin.address = \"{address}\""),
        "admin.address = \"127.0.0.1:0\"",
        1,
    );
    let route = "prefix = \"/\", projection = \"orders\", policy = \"wait;ms=1\"";
    let route = format!("route = [{{ upstream = \"http://{address}\", {route} }}]");
    let gateway = Gateway::start(&format!("{route}\n{config}")).await;
    gateway.ready().await;
    let refused = gateway.get("/round").await;
    assert_eq!((refused.status, refused.problem()), (508, "loop-detected"));
}

#[tokio::test]
async fn a_service_that_is_gone_is_stood_in_for_by_the_primary_s() {
    let shops = Shops::open("").await;
    let nobody = format!("http://127.0.0.1:{}", compose::ports::free().unwrap());
    let config = region_config(&shops.world.postgres, &shops.world.nats, &shops.world.primary.base);
    let route = shops.region.route().replace(&shops.region.url, &nobody);
    let gateway = Gateway::start(&format!("route = [{route}]\n{config}")).await;
    gateway.ready().await;
    shops.primary.stands_at(9);
    let read = gateway.get(ITEMS).await;
    assert_eq!((read.came_to(), &read.body["region"]), ((200, "forwarded"), &json!("us-east")));
    let read = gateway.read(ITEMS, "", "wait;ms=1").await;
    assert_eq!((read.status, read.problem()), (502, "upstream-unreachable"));
    assert_eq!(gateway.post(ITEMS, json!({})).await.status, 201, "writes go to the primary anyway");
    // What the service itself says is wrong is its answer.
    let broken = shops.world.region.get("/shop/broken").await;
    assert_eq!(
        (broken.status, broken.word(), &broken.body["broken"]),
        (500, "unverified", &json!(true))
    );
}

#[tokio::test]
async fn a_path_can_be_read_by_any_method_and_a_body_of_a_read_can_be_sent_twice() {
    let more = ", read_paths = [\"/shop/search\"], write_paths = [\"/shop/items\"]";
    let mut shops = Shops::open(more).await;
    let found = shops.world.region.post("/shop/search", json!({"q": "lamp"})).await;
    assert_eq!((found.came_to(), &found.body["region"]), ((200, "unverified"), &json!("eu-west")));
    let got = shops.world.region.get(ITEMS).await;
    assert_eq!((got.status, &got.body["region"]), (200, &json!("us-east")), "a write by its path");
    let token = shops.world.region.post(ITEMS, json!({})).await.token();
    let head = shops.world.region.open(&token).largest_position().get();
    shops.region.stands_at(head - 1);
    shops.primary.stands_at(head);
    shops.world.catch_up().await;
    shops.world.catch_up_primary().await;
    let request = shops.world.region.request(Method::POST, "/shop/search").body("{}");
    let request = request.header("consistency-token", token);
    let found = Reply::of(request.header("consistency-policy", "wait;ms=1, forward")).await;
    assert_eq!((found.came_to(), &found.body["region"]), ((200, "forwarded"), &json!("us-east")));
}

/// A browser whose cookie nobody here can open gets one for what it wrote, whatever the method.
#[tokio::test]
async fn a_write_by_its_path_is_carried_by_a_cookie_that_takes_the_place_of_an_unknown_one() {
    let shops = Shops::open(", write_paths = [\"/shop/write\"]").await;
    let key = Key::new(KeyId(9), b"fedcba9876543210fedcba9876543210").unwrap();
    let log_id = LogId::new(shops.world.region.config.log.id);
    let dropped = KeyRing::new(log_id, vec![key], KeyId(9)).unwrap();
    let dropped = dropped.seal(&Token::new(Epoch::FIRST).with_read(position(1)));
    for gateway in [&shops.world.primary, &shops.world.region] {
        let request = gateway.request(Method::GET, "/shop/write");
        let written = Reply::of(request.header("cookie", format!("tidemark={dropped}"))).await;
        assert_eq!(written.status, 201, "{written:?}");
        let mut cookies = written.headers.get_all("set-cookie").iter();
        let ours = cookies.find_map(|cookie| cookie.to_str().unwrap().strip_prefix("tidemark="));
        let ours = ours.expect("it can be carried").split(';').next().unwrap();
        let token = gateway.open(ours);
        assert_eq!(token.claims().len(), 1, "{token:?}");
        assert!(token.claims_dropped(), "{token:?}");
    }
}

#[tokio::test]
async fn what_a_service_says_is_not_vouched_for_while_something_is_parked() {
    let mut shops = Shops::open("").await;
    shops.world.stock().await;
    shops.world.place("o-1").await;
    let head = shops.world.catch_up().await;
    shops.region.stands_at(head.get());
    assert_eq!(shops.world.region.read(ITEMS, "", "").await.came_to(), (200, "local"));
    shops.world.projector.park("o-1", head).await;
    eventually("the parked aggregate is noticed", async || {
        let read = shops.world.region.read(ITEMS, "", "").await;
        read.header("consistency-status").starts_with("unverified;reason=parked")
    })
    .await;
    // Nor when it was waited for, or when the primary answers.
    let token = shops.world.region.post(ITEMS, json!({})).await.token();
    let head = shops.world.region.open(&token).largest_position().get();
    let request = shops.world.region.request(Method::GET, ITEMS);
    let request = request.header("consistency-policy", "wait;ms=5000");
    let waiting = tokio::spawn(Reply::of(request.header("consistency-token", &token)));
    shops.world.region.waiters(1).await;
    shops.region.stands_at(head);
    shops.world.catch_up().await;
    let read = waiting.await.unwrap();
    assert_eq!(read.came_to(), (200, "unverified"), "{read:?}");
    assert!(read.header("consistency-status").contains("reason=parked"), "{read:?}");
    shops.primary.stands_at(head);
    shops.world.catch_up_primary().await;
    let read = shops.world.region.read(ITEMS, &token, "primary").await;
    assert_eq!(read.came_to(), (200, "primary"), "nothing is parked there");
    shops.world.primary_projector.park("o-1", position(head)).await;
    eventually("the primary notices as well", async || {
        let read = shops.world.region.read(ITEMS, &token, "primary").await;
        read.header("consistency-status").starts_with("unverified;reason=parked")
    })
    .await;
}
