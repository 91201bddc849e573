//! Twenty thousand readers that wait for one commit, each for another row.
//!
//! The rows are of one partition, so one commit makes all of them current. The projector stands still
//! while the readers arrive, and is let go: the time counts from there, and so includes its commit.

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use compose::process::Signal;
use consistency::PartitionCount;
use futures::{StreamExt as _, stream::FuturesUnordered};
use http::Request;
use http_body_util::{BodyExt as _, Empty};
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde::Deserialize;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::Plan;
use crate::http::Connection;
use crate::report::{Goal, Line};
use crate::seed::{self, Tokens};
use crate::servers::{Primary, Setup, until};

pub const NAME: &str = "waiters_20k";
const BYTES_NAME: &str = "waiters_20k_bytes";

const CONNECTION_COUNT: usize = 200;
const STREAM_COUNT: usize = 100;
const READER_COUNT: usize = CONNECTION_COUNT * STREAM_COUNT;
/// As the worked example has it.
const PARTITION_COUNT: u16 = 8;
/// A busy machine takes its time to send so many requests: none may give up meanwhile.
const PATIENT: [(&str, &str); 2] =
    [("GATEWAY__READ__WAIT_MAX", "60s"), ("GATEWAY__LISTEN__REQUEST_TIMEOUT", "60s")];

type Sender = SendRequest<Empty<Bytes>>;

/// Seconds to the last answer, and bytes of a waiting reader.
pub async fn measure(plan: Plan) -> anyhow::Result<Vec<Line>> {
    let setup =
        Setup { gateway_settings: PATIENT.to_vec(), has_projector: true, ..Setup::default() };
    let primary = Primary::start(setup).await?;
    let partitions = PartitionCount::new(PARTITION_COUNT).context("there are partitions")?;
    let ids = (0..).map(|n| format!("crowd-{n}")).filter(|id| partitions.partition_of(id) == 0);
    let ids: Vec<String> = ids.take(READER_COUNT).collect();
    let head = seed::place(&primary, ids.iter().cloned()).await?;
    let tokens = Tokens::new(&primary, head)?;
    let idle_bytes = resident_bytes(&primary)?;
    let (mut seconds, mut bytes_each) = (Vec::new(), Vec::new());
    for sample in 0..=plan.pairs {
        let crowd = Crowd { primary: &primary, tokens: &tokens, ids: &ids, idle_bytes };
        let released = crowd.gather_and_release().await?;
        eprintln!(
            "  {sample}/{}  {:.3} s to the last answer, {:.0} bytes each",
            plan.pairs, released.seconds, released.bytes_each
        );
        // The allocator keeps what it once had: only the first crowd shows what readers take.
        if sample == 0 {
            bytes_each.push(released.bytes_each);
        } else {
            seconds.push(released.seconds);
        }
    }
    Ok(vec![
        Line::new(NAME, "s to the last answer", seconds, vec![], Goal::ValueMax(1.0)),
        Line::new(BYTES_NAME, "bytes each", bytes_each, vec![], Goal::ValueMax(24.0 * 1024.0)),
    ])
}

struct Crowd<'a> {
    primary: &'a Primary,
    tokens: &'a Tokens,
    ids: &'a [String],
    idle_bytes: f64,
}

struct Released {
    seconds: f64,
    bytes_each: f64,
}

#[derive(Deserialize)]
struct Written {
    position: u64,
}

impl Crowd<'_> {
    async fn gather_and_release(&self) -> anyhow::Result<Released> {
        let projector = self.primary.projector.as_ref().context("there is a projector")?;
        let mut senders = Vec::new();
        for _ in 0..CONNECTION_COUNT {
            senders.push(connect(self.primary).await?);
        }
        projector.signal(Signal::STOP);
        let token = self.write().await?;
        let mut readers = FuturesUnordered::new();
        for (nth, id) in self.ids.iter().enumerate() {
            readers.push(read(senders[nth % CONNECTION_COUNT].clone(), id, &token));
        }
        let all_wait =
            until("all readers wait", async || Ok(self.waiter_count().await? == READER_COUNT));
        let mut all_wait = std::pin::pin!(all_wait);
        // Requests are sent while their answers are awaited.
        tokio::select! {
            waiting = &mut all_wait => waiting?,
            answered = readers.next() => anyhow::bail!("answered too soon: {answered:?}"),
        }
        let bytes_each = (resident_bytes(self.primary)? - self.idle_bytes) / READER_COUNT as f64;
        let began = Instant::now();
        projector.signal(Signal::CONT);
        while let Some(answered) = readers.next().await {
            answered?;
        }
        Ok(Released { seconds: began.elapsed().as_secs_f64(), bytes_each })
    }

    /// Appends to the first order, and answers the token of whoever has seen that.
    async fn write(&self) -> anyhow::Result<String> {
        let body = r#"{"events":[{"type":"ItemAdded","data":{"product_id":"p-late","product_name":"Tide clock","unit_price_cents":1,"quantity":1}}]}"#;
        let request = format!(
            "POST /v1/aggregates/order/{}/events HTTP/1.1\r\nhost: bench\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            self.ids[0],
            body.len()
        );
        let mut connection = Connection::open(self.primary.address).await?;
        let answer = connection.exchange(request.as_bytes()).await?.succeeded()?;
        let written: Written = serde_json::from_slice(answer.body)?;
        let position = consistency::Position::new(written.position).context("it is small")?;
        Ok(self.tokens.at(position))
    }

    async fn waiter_count(&self) -> anyhow::Result<usize> {
        let url = format!("{}/status", self.primary.admin_url);
        let status: Value = reqwest::get(url).await?.json().await?;
        let count = status["waiters"].as_u64().context("the gateway tells how many wait")?;
        Ok(usize::try_from(count)?)
    }
}

async fn connect(primary: &Primary) -> anyhow::Result<Sender> {
    let stream = TcpStream::connect(primary.address).await?;
    stream.set_nodelay(true)?;
    let (sender, connection) =
        http2::Builder::new(TokioExecutor::new()).handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(sender)
}

async fn read(mut sender: Sender, id: &str, token: &str) -> anyhow::Result<()> {
    let request = Request::get(format!("http://bench/v1/views/order-detail/{id}"))
        .header("consistency-token", token)
        .header("consistency-policy", "wait;ms=60000")
        .body(Empty::new())?;
    sender.ready().await?;
    let answer = sender.send_request(request).await?;
    let (status, headers) = (answer.status(), answer.headers().clone());
    let said = headers.get("consistency-status").and_then(|said| said.to_str().ok());
    let body = answer.into_body().collect().await?.to_bytes();
    ensure!(status == 200, "{status}: {}", String::from_utf8_lossy(&body));
    ensure!(said.is_some_and(|said| said.starts_with("waited")), "answered as {said:?}");
    Ok(())
}

/// What the gateway's process has in memory.
fn resident_bytes(primary: &Primary) -> anyhow::Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", primary.gateway.pid()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().next());
    Ok(kilobytes.context("the system tells what is resident")?.parse::<f64>()? * 1024.0)
}
