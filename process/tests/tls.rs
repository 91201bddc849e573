//! TLS over real sockets, and clients that keep a connection to themselves.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test where it stands")]

use std::{path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, Response, Uri, Version};
use http_body_util::{BodyExt as _, Empty, Full};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use process::{
    client::{self, Protocols},
    config::Period,
    server::{self, ServerLimits},
    tls::{ServerTls, ServerTlsConfig, client_config},
};
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::{Instant, timeout},
};
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_secs(30);

/// Certificates of this machine that vouch for themselves, one after the other.
struct Certificates {
    folder: tempfile::TempDir,
}

impl Certificates {
    fn new() -> Self {
        let made = Self { folder: tempfile::tempdir().unwrap() };
        made.renew();
        made
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn config(&self) -> ServerTlsConfig {
        ServerTlsConfig {
            certificate: self.file("own.pem"),
            key: self.file("own.key"),
            reload_interval: Period::from_millis(10),
        }
    }

    /// Another certificate in place of the last. Trusted by who trusts the file `own.pem` as it is now.
    fn renew(&self) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        let certificate = params.self_signed(&key).unwrap();
        for (name, text) in [("own.key", key.serialize_pem()), ("own.pem", certificate.pem())] {
            let new = self.file("new");
            std::fs::write(&new, text).unwrap();
            std::fs::rename(new, self.file(name)).unwrap();
        }
    }
}

struct Served {
    address: std::net::SocketAddr,
    stop: CancellationToken,
}

/// Answers with `body` until dropped.
async fn serve(tls: Option<&Certificates>, limits: ServerLimits, body: Bytes) -> Served {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, stop) = (listener.local_addr().unwrap(), CancellationToken::new());
    let tls = tls.map(|certificates| ServerTls::open(&certificates.config()).unwrap());
    if let Some(tls) = tls.clone() {
        tokio::spawn(tls.keep_fresh(stop.clone()));
    }
    let answer = move |_, _| {
        let body = body.clone();
        async move { Response::new(Full::new(body)) }
    };
    tokio::spawn(server::serve_over(tls, None, listener, limits, answer, stop.clone()));
    Served { address, stop }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Asks once, on a new connection that trusts the certificate in `roots`.
async fn ask(served: &Served, roots: PathBuf, protocols: Protocols) -> Option<(Version, Bytes)> {
    let url: Uri = format!("https://{}/", served.address).parse().unwrap();
    let connector = client::connector(&url, Some(&roots), PATIENCE, protocols).unwrap();
    let client = Client::builder(TokioExecutor::new()).build(connector);
    let request = Request::get(url).body(Empty::<Bytes>::new()).unwrap();
    let response = client.request(request).await.ok()?;
    let version = response.version();
    Some((version, response.into_body().collect().await.ok()?.to_bytes()))
}

#[tokio::test]
async fn both_protocols_are_spoken_over_tls_and_strangers_are_not_trusted() {
    let (certificates, others) = (Certificates::new(), Certificates::new());
    let served = serve(Some(&certificates), ServerLimits::default(), "hello".into()).await;
    let roots = certificates.file("own.pem");
    let hello = Some((Version::HTTP_2, Bytes::from("hello")));
    assert_eq!(ask(&served, roots.clone(), Protocols::Http2).await, hello);
    assert_eq!(ask(&served, roots.clone(), Protocols::Any).await, hello);
    assert_eq!(ask(&served, others.file("own.pem"), Protocols::Any).await, None);
    // A client that knows nothing of HTTP/2.
    let tls = TlsConnector::from(Arc::new(client_config(Some(&roots)).unwrap()));
    let stream = TcpStream::connect(served.address).await.unwrap();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let mut stream = tls.connect(name, stream).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut answered = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut answered)).await.unwrap().unwrap();
    assert!(answered.starts_with(b"HTTP/1.1 200") && answered.ends_with(b"hello"));
}

#[tokio::test]
async fn a_renewed_certificate_serves_new_connections_and_a_broken_one_does_not() {
    let certificates = Certificates::new();
    let served = serve(Some(&certificates), ServerLimits::default(), "hello".into()).await;
    let roots = certificates.file("own.pem");
    assert!(ask(&served, roots.clone(), Protocols::Any).await.is_some());
    certificates.renew();
    let renewed = certificates.file("renewed.pem");
    std::fs::copy(&roots, &renewed).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while ask(&served, renewed.clone(), Protocols::Any).await.is_none() {
        assert!(Instant::now() < deadline, "the new certificate is not served");
    }
    std::fs::write(certificates.file("own.key"), "no key").unwrap();
    assert!(ServerTls::open(&certificates.config()).is_err());
    assert!(!certificates.config().mistakes("listen.tls").is_empty());
    for _ in 0..20 {
        assert!(ask(&served, renewed.clone(), Protocols::Any).await.is_some());
    }
}

#[tokio::test]
async fn a_client_that_does_not_finish_its_handshake_is_let_go() {
    let certificates = Certificates::new();
    let limits =
        ServerLimits { header_timeout: Period::from_millis(50), ..ServerLimits::default() };
    let served = serve(Some(&certificates), limits, Bytes::new()).await;
    // Nothing, the first bytes of a hello, and a request in the clear.
    for start in [&b""[..], b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/1.1\r\n\r\n"] {
        let mut stream = TcpStream::connect(served.address).await.unwrap();
        stream.write_all(start).await.unwrap();
        let mut rest = Vec::new();
        let read = timeout(PATIENCE, stream.read_to_end(&mut rest)).await;
        assert!(read.is_ok(), "still connected after {start:?}");
        assert!(!rest.starts_with(b"HTTP"), "{rest:?}");
    }
}

#[tokio::test]
async fn a_client_that_asks_and_asks_and_takes_no_answer_makes_room_for_others() {
    let limits = ServerLimits {
        connections_max: 1,
        answer_stall_max: Period::from_millis(100),
        ..ServerLimits::default()
    };
    // More than the buffers between two sockets hold.
    let served = serve(None, limits, Bytes::from(vec![b'x'; 16 * 1024 * 1024])).await;
    let mut greedy = TcpStream::connect(served.address).await.unwrap();
    greedy.write_all(&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".repeat(8)).await.unwrap();
    // There is one place, and it is free only once the other was shown out.
    let mut patient = TcpStream::connect(served.address).await.unwrap();
    patient.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut answered = Vec::new();
    timeout(PATIENCE, patient.read_to_end(&mut answered)).await.unwrap().unwrap();
    assert!(16 * 1024 * 1024 < answered.len());
    drop(greedy);
}
