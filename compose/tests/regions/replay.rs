//! The runbook for building a read model anew, followed while callers write and read.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use compose::demo::caller::Caller;
use compose::local::Stack;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::epochs::{program, runs};
use crate::stack::{EUROPE, add_item, caller, place, start};
use crate::topology::eventually;

const RUNBOOK: &str = include_str!("../../../docs/replay.md");
/// Reads that every caller does between two steps of the runbook at least.
const READS_BETWEEN: u64 = 10;

/// Callers at work, and how many reads each has done.
struct Callers {
    stop: CancellationToken,
    tasks: JoinSet<()>,
    reads: Vec<Arc<AtomicU64>>,
}

impl Callers {
    /// Some who write an order and read it back, and some who know that it was placed and read on.
    async fn begin(stack: &Stack) -> Self {
        let mut callers =
            Self { stop: CancellationToken::new(), tasks: JoinSet::new(), reads: Vec::new() };
        for n in 0..3 {
            let order = format!("o-replay-{n}");
            let mut writer = caller(stack, EUROPE);
            let path = place(&mut writer, &order).await;
            let [mut reader, mut lister] = [caller(stack, EUROPE), caller(stack, EUROPE)];
            reader.adopt(&writer);
            lister.adopt(&writer);
            let (reads, stop) = callers.reads();
            callers.tasks.spawn(write_and_read(writer, order.clone(), reads, stop));
            let (reads, stop) = callers.reads();
            callers.tasks.spawn(read_on(reader, path, reads, stop));
            let (reads, stop) = callers.reads();
            let list = format!("/v1/views/orders-by-customer/customer-of-{order}");
            callers.tasks.spawn(list_on(lister, list, reads, stop));
        }
        callers
    }

    fn reads(&mut self) -> (Arc<AtomicU64>, CancellationToken) {
        let reads = Arc::new(AtomicU64::new(0));
        self.reads.push(Arc::clone(&reads));
        (reads, self.stop.clone())
    }

    /// Waits until every caller has read more.
    async fn read_on(&mut self) {
        let before: Vec<u64> = self.reads.iter().map(|it| it.load(Ordering::Relaxed)).collect();
        eventually("every caller reads on", async || {
            if let Some(ended) = self.tasks.try_join_next() {
                ended.unwrap();
            }
            let now = self.reads.iter().map(|it| it.load(Ordering::Relaxed));
            now.zip(&before).all(|(now, before)| before + READS_BETWEEN <= now)
        })
        .await;
    }

    async fn end(mut self) {
        self.stop.cancel();
        while let Some(ended) = self.tasks.join_next().await {
            ended.unwrap();
        }
    }
}

/// Every answer holds the caller's last write.
async fn write_and_read(
    mut caller: Caller,
    order: String,
    reads: Arc<AtomicU64>,
    stop: CancellationToken,
) {
    let row = format!("/v1/views/order-detail/{order}");
    let list = format!("/v1/views/orders-by-customer/customer-of-{order}");
    let mut written = 1;
    while !stop.is_cancelled() {
        // An order takes so many items at most of one product.
        if written < 40 {
            written = add_item(&mut caller, &order).await.version().unwrap();
        }
        for _ in 0..3 {
            let answer = caller.get(&row, "").await.unwrap();
            assert_eq!(
                (answer.status.as_u16(), answer.version()),
                (200, Some(written)),
                "{answer:?}"
            );
            assert!(!answer.consistency.contains("stale"), "{answer:?}");
            let answer = caller.get(&list, "wait;ms=10000, forward").await.unwrap();
            let shown = answer.body["items"][0]["version"].as_u64();
            assert_eq!((answer.status.as_u16(), shown), (200, Some(written)), "{answer:?}");
            reads.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// What a caller has seen of a row it never sees an older state of.
async fn read_on(mut caller: Caller, path: String, reads: Arc<AtomicU64>, stop: CancellationToken) {
    let mut seen = 0;
    while !stop.is_cancelled() {
        let answer = caller.get(&path, "").await.unwrap();
        let version = answer.version().unwrap_or_default();
        assert!(answer.status == 200 && seen <= version, "seen {seen}: {answer:?}");
        seen = version;
        reads.fetch_add(1, Ordering::Relaxed);
    }
}

async fn list_on(mut caller: Caller, path: String, reads: Arc<AtomicU64>, stop: CancellationToken) {
    let mut seen = 0;
    while !stop.is_cancelled() {
        let answer = caller.get(&path, "wait;ms=10000, forward").await.unwrap();
        let version = answer.body["items"][0]["version"].as_u64().unwrap_or_default();
        assert!(answer.status == 200 && seen <= version, "seen {seen}: {answer:?}");
        seen = version;
        reads.fetch_add(1, Ordering::Relaxed);
    }
}

/// Does a step of the runbook as it is written there, with a region's own configuration.
async fn step(stack: &Stack, line: &str) -> String {
    assert!(RUNBOOK.contains(&format!("    {line}\n")), "the runbook does not say {line}");
    let config = stack.addresses().folder.join(EUROPE).join("region-projector.toml");
    let config = config.to_str().unwrap();
    let put = |word: &str| if word == "projector.toml" { config } else { word }.to_owned();
    let words: Vec<String> = line.split(' ').map(put).collect();
    runs(stack, program("region-projector"), &words).await
}

#[tokio::test]
async fn callers_notice_nothing_while_a_read_model_is_built_anew_switched_to_and_back_and_dropped()
{
    let stack = start().await;
    let mut callers = Callers::begin(&stack).await;
    callers.read_on().await;
    let rebuild = "region-projector --config projector.toml rebuild orders";
    let built = step(&stack, rebuild).await;
    assert!(built.contains("orders v2 is built by definition 1"), "{built}");
    callers.read_on().await;
    let listed = step(&stack, "region-projector --config projector.toml versions orders").await;
    assert!(listed.contains("ready") && listed.contains("active"), "{listed}");
    let switch = "region-projector --config projector.toml switch orders";
    let switched = step(&stack, switch).await;
    assert!(switched.contains("gateways read orders v2 now"), "{switched}");
    callers.read_on().await;
    let back = step(&stack, "region-projector --config projector.toml rollback orders").await;
    assert!(back.contains("gateways read orders v1 now"), "{back}");
    callers.read_on().await;
    let dropped = step(&stack, "region-projector --config projector.toml drop orders 2").await;
    assert!(dropped.contains("orders v2 is dropped"), "{dropped}");
    callers.read_on().await;
    // The same once more, and what was read before is dropped the moment that it is not.
    let built = step(&stack, rebuild).await;
    assert!(built.contains("orders v3 is built by definition 1"), "no number comes twice: {built}");
    step(&stack, switch).await;
    let told = step(&stack, "region-projector --config projector.toml prune").await;
    assert!(told.contains("orders v1 would be dropped"), "{told}");
    let pruned = step(&stack, "region-projector --config projector.toml prune --yes").await;
    assert!(pruned.contains("orders v1 is dropped"), "{pruned}");
    callers.read_on().await;
    callers.end().await;
    stack.stop().await.unwrap();
}
