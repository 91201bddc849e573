//! The runbook for building a read model anew, followed while callers write and read.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use compose::demo::caller::Caller;
use compose::local::Stack;
use compose::process::{Program, run};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::epochs::{program, runs};
use crate::stack::{EUROPE, add_item, caller, place, settled, start};
use crate::topology::eventually;

const PRIMARY: &str = "us-east";
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

/// The words of a step as it is written in the runbook, with the regions' own configurations and files.
fn words(stack: &Stack, line: &str) -> Vec<String> {
    assert!(RUNBOOK.contains(&format!("    {line}\n")), "the runbook does not say {line}");
    let folder = &stack.addresses().folder;
    let config = |region: &str| folder.join(region).join("region-projector.toml");
    let put = |word: &str| match word {
        "projector.toml" | "eu-west.toml" => config(EUROPE),
        "us-east.toml" => config(PRIMARY),
        "orders.snapshot" => folder.join("orders.snapshot"),
        word => PathBuf::from(word),
    };
    line.split(' ').map(|word| put(word).to_str().unwrap().to_owned()).collect()
}

async fn step(stack: &Stack, line: &str) -> String {
    runs(stack, program("region-projector"), &words(stack, line)).await
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

#[tokio::test]
async fn a_view_is_verified_carried_to_a_region_beside_its_own_and_read_there() {
    let stack = start().await;
    let mut writer = caller(&stack, EUROPE);
    let path = place(&mut writer, "o-carried").await;
    settled(&mut writer, &path, Duration::from_secs(60)).await;
    let verify = "region-projector --config projector.toml verify orders";
    for line in [verify, &format!("{verify} --whole")] {
        let sound = step(&stack, line).await;
        assert!(sound.contains("orders v1 holds what the log says"), "{sound}");
    }
    let export = "region-projector --config us-east.toml snapshot export orders orders.snapshot";
    step(&stack, export).await;
    let inspect = "region-projector --config eu-west.toml snapshot inspect orders.snapshot";
    let inspected = step(&stack, inspect).await;
    assert!(inspected.contains("taken in us-east"), "{inspected}");
    // What is here is not overwritten.
    let import = "region-projector --config eu-west.toml snapshot import orders.snapshot";
    let own = words(&stack, import);
    let log = stack.addresses().folder.join("operator.log");
    let refused = Program::new("import", program("region-projector"), log).args(&own[1..]);
    run(refused).await.expect_err("the projection is there already");
    let version = add_item(&mut writer, "o-carried").await.version().unwrap();
    let imported = step(&stack, &format!("{import} --beside")).await;
    assert!(imported.contains("taken in as orders v2"), "{imported}");
    let switch = "region-projector --config projector.toml switch orders";
    let switched = step(&stack, switch).await;
    assert!(switched.contains("gateways read orders v2 now"), "{switched}");
    let answer = writer.get(&path, "wait;ms=10000").await.unwrap();
    assert_eq!((answer.status.as_u16(), answer.version()), (200, Some(version)), "{answer:?}");
    let sound = step(&stack, verify).await;
    assert!(sound.contains("orders v2 holds what the log says"), "{sound}");
    let backfill =
        "region-projector --config projector.toml backfill orders --rows-per-second 1000";
    let filled = step(&stack, backfill).await;
    assert!(filled.contains("no row of orders v2 lacks anything"), "{filled}");
    stack.stop().await.unwrap();
}
