//! Callers who write on and on, each write until it is done, and the account of what they were told.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
};

use reqwest::Method;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::world::{Gateway, Reply, World, eventually};

const LANE_COUNT: usize = 4;
/// What may be said to a writer whose write is not done now.
const TRY_AGAIN: [&str; 3] = ["primary-unreachable", "outcome-unknown", "overloaded"];

pub struct Writers {
    account: Arc<Mutex<Account>>,
    stop: CancellationToken,
    lanes: JoinSet<()>,
}

#[derive(Default)]
struct Account {
    /// Positions by key.
    acknowledged: BTreeMap<String, u64>,
    /// How often each problem was the answer.
    refused: BTreeMap<String, usize>,
}

impl Writers {
    /// Half of them write through each gateway.
    pub fn start(gateways: [&Gateway; 2]) -> Self {
        let (account, stop) = (Arc::<Mutex<Account>>::default(), CancellationToken::new());
        let mut lanes = JoinSet::new();
        for (nth, gateway) in gateways.into_iter().cycle().take(LANE_COUNT).enumerate() {
            let path = format!("{}/v1/aggregates/note/n-{}/events", gateway.base, nth % 3);
            lanes.spawn(write_on(path, format!("lane-{nth}"), Arc::clone(&account), stop.clone()));
        }
        Self { account, stop, lanes }
    }

    fn account(&self) -> MutexGuard<'_, Account> {
        self.account.lock().unwrap()
    }

    /// Waits until so many more writes are acknowledged.
    pub async fn go_on(&self, more: usize) {
        let wanted = self.account().acknowledged.len() + more;
        eventually("the writers go on", async || wanted <= self.account().acknowledged.len()).await;
    }

    /// Waits until so many more answers were refusals.
    pub async fn are_refused(&self, more: usize) {
        let count = || self.account().refused.values().sum::<usize>();
        let wanted = count() + more;
        eventually("the writers are refused", async || wanted <= count()).await;
    }

    pub fn refused_with(&self, problem: &str) -> usize {
        self.account().refused.get(problem).copied().unwrap_or_default()
    }

    /// Ends when every write that was begun is done. Each is in the log once, where it was said to be, and
    /// nothing else is.
    pub async fn all_is_in_the_log_of(mut self, world: &World) {
        self.stop.cancel();
        while let Some(ended) = self.lanes.join_next().await {
            ended.unwrap();
        }
        let mut in_log = BTreeMap::new();
        for event in world.log().await {
            let data: Value = serde_json::from_str(&event.data).unwrap();
            let key = data["key"].as_str().unwrap().to_owned();
            let before = in_log.insert(key, event.at.position.get());
            assert_eq!(before, None, "{data} is in the log twice");
        }
        assert_eq!(in_log, self.account().acknowledged);
    }
}

async fn write_on(
    url: String,
    lane: String,
    account: Arc<Mutex<Account>>,
    stop: CancellationToken,
) {
    let client = reqwest::Client::new();
    for nth in 0.. {
        if stop.is_cancelled() {
            return;
        }
        let key = format!("{lane}-{nth}");
        let body = json!({"events": [{"type": "Noted", "data": {"key": key}}]});
        loop {
            let request = client.request(Method::POST, &url).timeout(crate::world::DEADLINE);
            let reply = Reply::of(request.header("idempotency-key", &key).json(&body)).await;
            if reply.status < 300 {
                let position = reply.body["position"].as_u64().unwrap();
                account.lock().unwrap().acknowledged.insert(key, position);
                break;
            }
            assert_eq!(reply.status, 503, "{reply:?}");
            assert!(reply.header("retry-after").parse::<u64>().is_ok(), "{reply:?}");
            let problem = reply.problem().to_owned();
            assert!(TRY_AGAIN.contains(&problem.as_str()), "{reply:?}");
            *account.lock().unwrap().refused.entry(problem).or_default() += 1;
        }
    }
}
