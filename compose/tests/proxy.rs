//! The WAN proxy: what passes, what is late, what is cut, and the orders it takes.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use compose::proxy::{Proxies, Stream, Toxic};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, timeout};

const LINK: &str = "events-eu-west";
const PATIENCE: Duration = Duration::from_secs(20);

/// Sends back what it is sent, and closes its half when the client closes the other.
async fn echo_server() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut reader, mut writer) = stream.split();
                let _ = tokio::io::copy(&mut reader, &mut writer).await;
                let _ = writer.shutdown().await;
            });
        }
    });
    address
}

async fn link() -> (Proxies, String) {
    let proxies = Proxies::start(0).await.unwrap();
    proxies.create(LINK, "127.0.0.1:0", &echo_server().await).await.unwrap();
    let listen = get(&proxies, "").await["listen"].as_str().unwrap().to_owned();
    (proxies, listen)
}

async fn get(proxies: &Proxies, path: &str) -> Value {
    let url = format!("{}/proxies/{LINK}{path}", proxies.url());
    reqwest::get(url).await.unwrap().json().await.unwrap()
}

async fn echoes(stream: &mut TcpStream, word: &[u8]) -> bool {
    let mut back = vec![0; word.len()];
    let round_trip = async {
        stream.write_all(word).await?;
        stream.read_exact(&mut back).await
    };
    timeout(PATIENCE, round_trip).await.unwrap().is_ok() && back == word
}

/// As a program has it that was being started when the port was closed.
#[tokio::test]
async fn a_port_that_somebody_is_about_to_leave_is_asked_for_again() {
    let leaving = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let listen = leaving.local_addr().unwrap().to_string();
    let proxies = Proxies::start(0).await.unwrap();
    let upstream = echo_server().await;
    let (created, ()) = tokio::join!(proxies.create(LINK, &listen, &upstream), async {
        tokio::task::yield_now().await;
        drop(leaving);
    });
    created.unwrap();
    assert!(echoes(&mut TcpStream::connect(listen).await.unwrap(), b"tide").await);
}

#[tokio::test]
async fn bytes_pass_and_are_counted() {
    let (proxies, listen) = link().await;
    let mut stream = TcpStream::connect(listen).await.unwrap();
    assert!(echoes(&mut stream, b"tide").await);
    assert_eq!(proxies.bytes(LINK).unwrap(), (4, 4));
}

#[tokio::test]
async fn a_half_closed_connection_still_answers() {
    let (_proxies, listen) = link().await;
    let mut stream = TcpStream::connect(listen).await.unwrap();
    stream.write_all(b"last words").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut back = String::new();
    timeout(PATIENCE, stream.read_to_string(&mut back)).await.unwrap().unwrap();
    assert_eq!(back, "last words");
}

#[tokio::test]
async fn latency_delays_each_direction_and_keeps_the_order() {
    let (proxies, listen) = link().await;
    proxies.add_toxic(LINK, Toxic::latency("up", Stream::Upstream, 60)).unwrap();
    proxies.add_toxic(LINK, Toxic::latency("down", Stream::Downstream, 40)).unwrap();
    let mut stream = TcpStream::connect(listen).await.unwrap();
    let start = Instant::now();
    assert!(echoes(&mut stream, b"0123456789").await);
    assert!(start.elapsed() >= Duration::from_millis(100), "{:?}", start.elapsed());
}

/// Held back chunk by chunk these bytes would take minutes.
#[tokio::test]
async fn latency_does_not_limit_how_much_passes() {
    const BYTES: usize = 64 * 1024 * 1024;
    let (proxies, listen) = link().await;
    proxies.add_toxic(LINK, Toxic::latency("up", Stream::Upstream, 100)).unwrap();
    let (mut reader, mut writer) = TcpStream::connect(listen).await.unwrap().into_split();
    let send = async {
        let block = vec![7; 64 * 1024];
        for _ in 0..BYTES / block.len() {
            writer.write_all(&block).await.unwrap();
        }
        writer.shutdown().await.unwrap();
    };
    let mut sink = tokio::io::sink();
    let receive = tokio::io::copy(&mut reader, &mut sink);
    let both = async { tokio::join!(send, receive) };
    let ((), received) = timeout(Duration::from_secs(60), both).await.unwrap();
    assert_eq!(received.unwrap(), BYTES as u64);
}

#[tokio::test]
async fn a_cut_link_closes_and_refuses_until_it_is_healed() {
    let (proxies, listen) = link().await;
    let mut stream = TcpStream::connect(&listen).await.unwrap();
    assert!(echoes(&mut stream, b"before").await);
    proxies.set_enabled(LINK, false).await.unwrap();
    assert!(!echoes(&mut stream, b"during").await);
    assert!(TcpStream::connect(&listen).await.is_err());
    assert_eq!(get(&proxies, "").await["enabled"], false);

    proxies.set_enabled(LINK, true).await.unwrap();
    let mut stream = TcpStream::connect(&listen).await.unwrap();
    assert!(echoes(&mut stream, b"after").await);
}

#[tokio::test]
async fn a_black_hole_swallows_and_closes_only_when_it_ends() {
    let (proxies, listen) = link().await;
    let mut stream = TcpStream::connect(&listen).await.unwrap();
    assert!(echoes(&mut stream, b"before").await);
    proxies.add_toxic(LINK, Toxic::blackhole("hole", Stream::Upstream)).unwrap();
    stream.write_all(b"into the hole").await.unwrap();
    let mut back = [0; 1];
    assert!(timeout(Duration::from_millis(300), stream.read(&mut back)).await.is_err());
    // A new connection is taken, and as silent.
    let mut second = TcpStream::connect(&listen).await.unwrap();
    second.write_all(b"hello").await.unwrap();
    assert!(timeout(Duration::from_millis(100), second.read(&mut back)).await.is_err());
    assert_eq!(proxies.bytes(LINK).unwrap().0, 6);

    proxies.remove_toxic(LINK, "hole").unwrap();
    let end = timeout(PATIENCE, stream.read(&mut back)).await.unwrap();
    assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
    let mut third = TcpStream::connect(&listen).await.unwrap();
    assert!(echoes(&mut third, b"after").await);
}

#[tokio::test]
async fn a_dropped_topology_of_proxies_listens_no_longer() {
    let (proxies, listen) = link().await;
    let api = proxies.url();
    drop(proxies);
    let silent = async {
        while TcpStream::connect(&listen).await.is_ok() || reqwest::get(&api).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, silent).await.unwrap();
}

#[tokio::test]
async fn stopped_proxies_listen_no_longer_when_the_stop_returns() {
    let (proxies, listen) = link().await;
    let mut stream = TcpStream::connect(&listen).await.unwrap();
    assert!(echoes(&mut stream, b"before").await);
    proxies.stop().await;
    assert!(!echoes(&mut stream, b"after").await);
    assert!(TcpStream::connect(&listen).await.is_err());
    assert!(reqwest::get(proxies.url()).await.is_err());
}

/// What a script for Toxiproxy sends.
#[tokio::test]
async fn orders_by_http_do_what_toxiproxy_would() {
    let (proxies, _) = link().await;
    let http = reqwest::Client::new();
    let order = async |method: &str, path: &str, body: Value| {
        let method = method.parse::<reqwest::Method>().unwrap();
        let request = http.request(method, format!("{}{path}", proxies.url()));
        let answer = request.body(body.to_string()).send().await.unwrap();
        (answer.status().as_u16(), answer.json::<Value>().await.unwrap_or_default())
    };
    let toxics = format!("/proxies/{LINK}/toxics");
    let toxic = json!({"type": "latency", "attributes": {"latency": 400, "jitter": 50}});
    let (status, made) = order("POST", &toxics, toxic.clone()).await;
    assert_eq!(status, 200);
    assert_eq!(made["name"], "latency_downstream");
    assert_eq!(made["attributes"], json!({"latency": 400, "jitter": 50}));
    assert_eq!(order("POST", &toxics, toxic).await.0, 409);
    let one = format!("{toxics}/latency_downstream");
    let (status, changed) = order("POST", &one, json!({"attributes": {"latency": 7}})).await;
    assert_eq!((status, &changed["attributes"]["latency"]), (200, &json!(7)));
    assert_eq!(order("GET", &toxics, Value::Null).await.1.as_array().unwrap().len(), 1);
    assert_eq!(order("DELETE", &one, Value::Null).await.0, 204);
    assert_eq!(order("DELETE", &one, Value::Null).await.0, 404);

    let path = format!("/proxies/{LINK}");
    assert_eq!(order("POST", &path, json!({"enabled": false})).await.1["enabled"], false);
    assert_eq!(order("POST", "/reset", Value::Null).await.0, 204);
    assert_eq!(order("GET", "/proxies", Value::Null).await.1[LINK]["enabled"], true);

    let second = json!({"name": "second", "listen": "127.0.0.1:0", "upstream": "127.0.0.1:1"});
    assert_eq!(order("POST", "/proxies", second.clone()).await.0, 201);
    assert_eq!(order("POST", "/proxies", second).await.0, 409);
    assert_eq!(order("DELETE", "/proxies/second", Value::Null).await.0, 204);
    assert_eq!(order("GET", "/proxies/second", Value::Null).await.0, 404);
    assert_eq!(order("POST", "/proxies", json!({"name": 7})).await.0, 400);
    assert_eq!(order("GET", "/elsewhere", Value::Null).await.0, 404);
}
