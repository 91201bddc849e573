//! A read and a write whose whole way is encrypted: caller to region, region to primary, both to NATS
//! and to Postgres.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use compose::{
    nats::{self, Server},
    postgres::{self, Cluster, Options},
};
use consistency::Position;
use http::{Method, Request, StatusCode, Uri, Version};
use http_body_util::{BodyExt as _, Full};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use process::client::{self, Connector, Protocols};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use serde_json::{Value, json};
use sqlx::Connection as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use crate::{
    projector::Projector,
    world::{
        CREDENTIAL, DEADLINE, Gateway, PRIMARY, REGION, events_of, order, primary_config,
        region_config,
    },
};

const ROW: &str = "/v1/views/order-detail/o-1";

/// A root that nobody knows but us, and a certificate of this machine that follows from it.
struct Certificates {
    folder: tempfile::TempDir,
    certificate: String,
    key: String,
}

impl Certificates {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut root = CertificateParams::new(Vec::new()).unwrap();
        root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        root.distinguished_name.push(DnType::CommonName, "the root of a test");
        let root = CertifiedIssuer::self_signed(root, KeyPair::generate().unwrap()).unwrap();
        let own = KeyPair::generate().unwrap();
        let names = CertificateParams::new(vec!["127.0.0.1".to_owned(), "localhost".to_owned()]);
        let certificate = names.unwrap().signed_by(&own, &root).unwrap().pem();
        let made = Self { folder, certificate, key: own.serialize_pem() };
        std::fs::write(made.ca(), root.pem()).unwrap();
        std::fs::write(made.file("own.pem"), &made.certificate).unwrap();
        std::fs::write(made.file("own.key"), &made.key).unwrap();
        made
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn ca(&self) -> PathBuf {
        self.file("ca.pem")
    }

    async fn servers(&self) -> (Server, Cluster) {
        let (certificate, key) = (self.file("own.pem"), self.file("own.key"));
        let nats = Server::start_single_over(Some(nats::Tls { certificate, key, ca: self.ca() }));
        let (certificate, key) = (self.certificate.clone(), self.key.clone());
        let tls = Some(postgres::Tls { certificate, key });
        let postgres = Cluster::start(Options { tls, ..Options::default() });
        let (nats, postgres) = tokio::join!(nats, Box::pin(postgres));
        (nats.unwrap(), postgres.unwrap())
    }

    /// A gateway's configuration in which nothing is in the clear.
    fn over_tls(&self, toml: &str) -> String {
        let ca = self.ca().display().to_string();
        let database = format!("?sslmode=verify-full&sslrootcert={ca}\"");
        let lines = toml.lines().map(|line| {
            let line = line.trim();
            if let Some(url) =
                line.strip_prefix("database.url = ").or(line.strip_prefix("log_database.url = "))
            {
                let key = line.split(" = ").next().unwrap();
                format!("{key} = {}{database}", url.trim_end_matches('"'))
            } else if let Some(nats) = line.strip_prefix("nats = {") {
                format!("nats = {{ tls_required = true, tls_ca = \"{ca}\", {nats}")
            } else if let Some(primary) = line.strip_prefix("primary_region.name") {
                format!("primary_region.tls_ca = \"{ca}\"\nprimary_region.name{primary}")
            } else if line.starts_with("listen.address = ") {
                let (certificate, key) = (self.file("own.pem"), self.file("own.key"));
                let (certificate, key) = (certificate.display(), key.display());
                let tls = format!("{{ certificate = \"{certificate}\", key = \"{key}\" }}");
                format!("{line}\nlisten.tls = {tls}")
            } else {
                line.to_owned()
            }
        });
        lines.collect::<Vec<_>>().join("\n")
    }
}

/// Who trusts certificates that follow from a root.
struct Caller {
    client: Client<Connector, Full<Bytes>>,
    base: String,
}

#[derive(Debug)]
struct Answered {
    status: StatusCode,
    version: Version,
    headers: http::HeaderMap,
    text: String,
}

impl Caller {
    fn of(gateway: &Gateway, ca: &Path) -> Self {
        let base = encrypted(&gateway.base);
        let url: Uri = base.parse().unwrap();
        let connector = client::connector(&url, Some(ca), DEADLINE, Protocols::Any).unwrap();
        Self { client: Client::builder(TokioExecutor::new()).build(connector), base }
    }

    async fn ask(&self, method: Method, path: &str, header: (&str, &str), body: Value) -> Answered {
        let request = Request::builder().method(method).uri(format!("{}{path}", self.base));
        let request = request.header("content-type", "application/json").header(header.0, header.1);
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let request = request.body(Full::new(Bytes::from(body))).unwrap();
        let (parts, body) = self.client.request(request).await.unwrap().into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        Answered {
            status: parts.status,
            version: parts.version,
            headers: parts.headers,
            text: String::from_utf8(body.to_vec()).unwrap(),
        }
    }

    async fn command(&self, name: &str, body: Value) -> Answered {
        let path = format!("/v1/commands/{name}");
        let done = self.ask(Method::POST, &path, ("accept", "*/*"), body).await;
        assert_eq!(done.status, 201, "{done:?}");
        done
    }
}

fn encrypted(url: &str) -> String {
    url.replace("http://", "https://")
}

/// Every connection of ours is encrypted, as the servers see it.
async fn assert_encrypted(nats: &Server, postgres: &Cluster) {
    let url = format!("{}/connz", nats.monitor_url());
    let told: Value = reqwest::get(url).await.unwrap().json().await.unwrap();
    let connections = told["connections"].as_array().unwrap();
    assert!(3 <= connections.len(), "{told}");
    assert!(connections.iter().all(|connection| connection["tls_version"].is_string()), "{told}");
    let url = postgres.url("tidemark_log");
    let mut session = sqlx::PgConnection::connect(&url).await.unwrap();
    let (count, all): (i64, bool) = sqlx::query_as(
        "select count(*), bool_and(ssl) from pg_stat_ssl join pg_stat_activity using (pid)
         where application_name like 'tidemark-%'",
    )
    .fetch_one(&mut session)
    .await
    .unwrap();
    assert!(0 < count && all, "{count}");
    let clear = sqlx::PgConnection::connect(&format!("{url}?sslmode=disable")).await;
    assert!(clear.is_err(), "the server would take a connection in the clear");
}

/// Whoever speaks in the clear gets no answer.
async fn assert_shut_in_the_clear(gateway: &Gateway) {
    let mut stream = TcpStream::connect(gateway.running.address).await.unwrap();
    stream.write_all(b"GET /v1/currency HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut answered = Vec::new();
    let read = timeout(DEADLINE, stream.read_to_end(&mut answered)).await.unwrap();
    let answered = String::from_utf8_lossy(&answered);
    assert!(read.is_err() || !answered.contains("HTTP"), "{answered}");
}

#[tokio::test]
async fn a_write_and_its_read_are_encrypted_all_the_way() {
    let certificates = Certificates::new();
    let (nats, postgres) = Box::pin(certificates.servers()).await;
    postgres.create_database("tidemark_log").await.unwrap();
    let _idle = Projector::start(PRIMARY, &postgres, &nats).await;
    let mut projector = Projector::start(REGION, &postgres, &nats).await;
    let primary = certificates.over_tls(&primary_config(&postgres, &nats));
    let primary = Gateway::start(&primary).await;
    let toml = region_config(&postgres, &nats, &encrypted(&primary.base));
    let toml = certificates.over_tls(&toml);
    let region = Gateway::start(&toml).await;
    primary.ready().await;
    region.ready().await;
    let caller = Caller::of(&region, &certificates.ca());
    caller
        .command("CreateProduct", json!({"product_id": "p-1", "name": "Lamp", "price_cents": 2500}))
        .await;
    caller.command("RegisterCustomer", json!({"customer_id": "c-1", "name": "Ada"})).await;
    let placed = caller.command("PlaceOrder", order("o-1")).await;
    assert_eq!(placed.version, Version::HTTP_2, "agreed on with tls");
    let token = placed.headers["consistency-token"].to_str().unwrap();
    // The region reads the log, as its projector would, and announces through NATS.
    let at_primary = Caller::of(&primary, &certificates.ca());
    let credential = ("tidemark-credential", CREDENTIAL);
    let log = at_primary.ask(Method::GET, "/internal/log?after=0", credential, Value::Null).await;
    let log = events_of(&log.text);
    let head = log.last().map_or(Position::ZERO, |last| last.at.position);
    projector.apply(&log, head).await;
    projector.announce(head).await;
    let read = caller.ask(Method::GET, ROW, ("consistency-token", token), Value::Null).await;
    assert_eq!(read.status, 200, "{read:?}");
    let said = read.headers["consistency-status"].to_str().unwrap();
    assert!(said.starts_with("local") || said.starts_with("waited"), "{said}");
    assert_encrypted(&nats, &postgres).await;
    assert_shut_in_the_clear(&region).await;
    // Who trusts another root speaks to nobody.
    let other = Certificates::new();
    let ca = certificates.ca().display().to_string();
    let primary_trust = format!("primary_region.tls_ca = \"{ca}\"");
    let elsewhere = format!("primary_region.tls_ca = \"{}\"", other.ca().display());
    assert!(toml.contains(&primary_trust));
    let doubting = Gateway::start(&toml.replace(&primary_trust, &elsewhere)).await;
    let caller = Caller::of(&doubting, &certificates.ca());
    let path = "/v1/aggregates/order/o-1";
    let refused = caller.ask(Method::GET, path, ("accept", "*/*"), Value::Null).await;
    assert_eq!(refused.status, 503, "{refused:?}");
    assert!(refused.text.contains("primary-unreachable"), "{refused:?}");
}
