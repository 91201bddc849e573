//! A bounded flood of everything that misbehaves: a gateway in a process of its own grows no further than
//! its bounds, and answers everybody else.

use std::{net::SocketAddr, path::Path, time::Duration};

use compose::{
    nats::Server,
    postgres::Cluster,
    process::{Child, Program},
};
use futures::{StreamExt as _, stream};
use tokio::{io::AsyncWriteExt as _, net::TcpStream, time::timeout};

use crate::{
    projector::Projector,
    world::{DEADLINE, PRIMARY, eventually, primary_config},
};

const CONNECTIONS_MAX: usize = 64;
/// What the process may grow by, far above what its bounds come to and far below what is sent.
const GROWTH_BYTES_MAX: u64 = 192 * 1024 * 1024;

const BOUNDS: &str = r#"
    auth = { mode = "trusted-header", trusted_header = { name = "x-user", addresses = ["127.0.0.1/32"] } }
    rate_limit = { requests_per_second = 5, burst = 5, callers_max = 64 }
    listen.limits = { connections_max = 64, header_timeout = "1s", answer_stall_max = "500ms" }
    "#;

fn free() -> SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn memory_bytes(gateway: &Child) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", gateway.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

fn open_file_count(gateway: &Child) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", gateway.pid())).unwrap().count()
}

async fn connected(address: SocketAddr) -> Option<TcpStream> {
    timeout(Duration::from_secs(5), TcpStream::connect(address)).await.ok()?.ok()
}

/// Sends as much as is taken, and reads nothing.
async fn pour(address: SocketAddr, bytes: Vec<u8>) -> Option<TcpStream> {
    let mut stream = connected(address).await?;
    let _ = timeout(Duration::from_secs(5), stream.write_all(&bytes)).await;
    Some(stream)
}

async fn flood(address: SocketAddr) {
    let get =
        |user: usize| format!("GET /v1/currency HTTP/1.1\r\nHost: x\r\nX-User: u{user}\r\n\r\n");
    let filling = format!("X-Filling: {}\r\n", "x".repeat(1000));
    let mut floods: Vec<Vec<u8>> = Vec::new();
    // Half a request, and no more.
    floods.extend((0..300).map(|_| b"GET / HTTP/1.1\r\nHost: x\r\n".to_vec()));
    // Requests upon requests, whose answers nobody reads.
    floods.extend((0..40).map(|user| get(user).repeat(5_000).into_bytes()));
    // Callers that were never seen before and never come again.
    floods.extend((0..40).map(|nth| {
        (0..500).map(|at| get(1_000 + nth * 500 + at)).collect::<String>().into_bytes()
    }));
    // Headers without an end, headers without number, a body that never comes.
    floods.extend(
        (0..40).map(|_| format!("GET / HTTP/1.1\r\n{}", filling.repeat(4_000)).into_bytes()),
    );
    floods.extend((0..40).map(|_| {
        format!("GET / HTTP/1.1\r\nHost: x\r\n{}\r\n", "A: b\r\n".repeat(900)).into_bytes()
    }));
    floods.extend((0..40).map(|_| {
        b"POST /v1/commands/PlaceOrder HTTP/1.1\r\nHost: x\r\nX-User: u\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n\r\n{".to_vec()
    }));
    let mut poured = stream::iter(floods).map(|bytes| pour(address, bytes)).buffer_unordered(128);
    let mut held = Vec::new();
    while let Some(stream) = poured.next().await {
        held.extend(stream);
    }
}

fn start(toml: &str, folder: &Path) -> Child {
    let file = folder.join("gateway.toml");
    std::fs::write(&file, toml).unwrap();
    let program = env!("CARGO_BIN_EXE_gateway");
    let log = folder.join("gateway.log");
    Program::new("gateway", program, log).arg("--config").arg(file).spawn().unwrap()
}

#[tokio::test]
async fn a_flood_of_all_that_misbehaves_grows_nothing_and_locks_nobody_out() {
    let (nats, postgres) = tokio::join!(Server::start_single(), Cluster::shared());
    let (nats, postgres) = (nats.unwrap(), postgres.unwrap());
    postgres.create_database("tidemark_log").await.unwrap();
    let _idle = Projector::start(PRIMARY, &postgres, &nats).await;
    let address = free();
    let toml = primary_config(&postgres, &nats)
        .replace("listen.address = \"127.0.0.1:0\"", &format!("listen.address = \"{address}\""))
        .replace("auth.mode = \"none\"", BOUNDS);
    let folder = tempfile::tempdir().unwrap();
    let gateway = start(&toml, folder.path());
    let answered = async || {
        let asking = reqwest::Client::new().get(format!("http://{address}/v1/currency"));
        let asking = asking.header("x-user", "ada").timeout(Duration::from_secs(5)).send();
        asking.await.is_ok_and(|answer| answer.status() == 200)
    };
    eventually("the gateway answers", answered).await;
    let (before, idle_files) = (memory_bytes(&gateway), open_file_count(&gateway));
    let most_files = async {
        let mut most = 0;
        loop {
            most = open_file_count(&gateway).max(most);
            assert!(most <= idle_files + CONNECTIONS_MAX + 32, "{most} open files");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        biased;
        // Never ends but by an assertion.
        () = most_files => {}
        () = flood(address) => {}
    }
    // As soon as those who misbehaved are let go, everybody else is served.
    timeout(DEADLINE, eventually("others are answered again", answered)).await.unwrap();
    let grown = memory_bytes(&gateway).saturating_sub(before);
    assert!(grown <= GROWTH_BYTES_MAX, "grew by {grown} bytes");
    assert!(gateway.is_running(), "{}", gateway.log_tail());
}
