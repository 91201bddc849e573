//! Epochs that are opened while this gateway runs.
//!
//! What a caller has written and seen is judged in the epochs that are known when its request comes. A
//! primary reads them from the log again and again, and whenever it meets a newer one; a region learns
//! them from the primary and from its own database (`feed`). Until then nothing is answered or appended
//! that would pass a judgement over.

use std::{sync::Arc, time::Duration};

use consistency::{EpochHistory, Position, Token, TokenStatus};
use event_store::{EventStore, Head, ReadError};
use http::{HeaderMap, Method};
use process::admin::{Condition, Readiness};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::{
    error::Error,
    feed,
    gateway::{Gateway, Role},
    token_carrier::Presented,
    upstream::{Outgoing, Upstream},
};

const LOG: &str = "log";
/// Those who must know are asked this often at most, however many tokens call for it.
const ASK_PAUSE: Duration = Duration::from_millis(250);
/// Bound on asking, so that there is time left to answer without having learnt anything.
const ASK_MAX: Duration = Duration::from_secs(2);

/// Opens all that a request carries. A token of an epoch that is not known here is one of ours, so there
/// is such an epoch: it is learnt first, and the token judged then.
pub async fn open(gateway: &Gateway, headers: &HeaderMap, deadline: Instant) -> Presented {
    let history = gateway.history();
    let presented = gateway.carrier.open(headers, &history);
    if !matches!(presented.status, TokenStatus::NewerEpoch(_)) {
        return presented;
    }
    let until = deadline.min(Instant::now() + ASK_MAX);
    // Asked or not: others may have learnt it meanwhile. Boxed, since every request passes here and hardly
    // any has to ask.
    let _ = timeout_at(until, Box::pin(ask(gateway, &history, until))).await;
    gateway.carrier.open(headers, &gateway.history())
}

/// Asks who must know. One request asks; the others wait for what it learns.
async fn ask(gateway: &Gateway, known: &EpochHistory, until: Instant) {
    let mut asked_at = gateway.epochs_asked_at.lock().await;
    let is_over = known.current() < gateway.history().current();
    if is_over || asked_at.is_some_and(|at| at.elapsed() < ASK_PAUSE) {
        return;
    }
    *asked_at = Some(Instant::now());
    match &gateway.role {
        Role::Primary(store) => {
            if let Err(error) = learn(gateway, store).await {
                tracing::debug!(%error, "epochs not read");
            }
        }
        Role::Region(upstream) => ask_primary(gateway, upstream, until).await,
    }
}

/// What the primary answers is learnt by whoever asks; see [`feed::heartbeat`].
async fn ask_primary(gateway: &Gateway, upstream: &Upstream, until: Instant) {
    let outgoing = Outgoing {
        method: &Method::GET,
        path_and_query: "/internal/epochs".to_owned(),
        headers: HeaderMap::new(),
        body: bytes::Bytes::new().into(),
        deadline: until,
        only_reads: true,
    };
    match upstream.send(outgoing).await {
        Ok(reply) if reply.status.is_success() => feed::learn(gateway, reply.head, &reply.body),
        Ok(_) | Err(_) => tracing::debug!("the primary did not tell its epochs"),
    }
}

/// Reads the epochs of the log.
pub async fn learn(gateway: &Gateway, store: &EventStore) -> Result<(), ReadError> {
    gateway.learn_history(store.epochs().await?);
    Ok(())
}

/// Whether an answer that was made here may go to a caller that was judged as `known`. One that shows a newer
/// epoch may not: its token would take the place of claims that nobody carried there, and of losses that
/// nobody told. What it shows is counted in the newest epoch that is known here by now.
///
/// `has_acted` says that a write was done, by a service behind the gateway: our own are done only in the
/// epoch that their callers were judged in.
pub async fn fits(
    gateway: &Gateway,
    known: Option<&Token>,
    shows: Option<&Token>,
    has_acted: bool,
) -> Result<(), Error> {
    let (Some(known), Some(shows)) = (known, shows) else { return Ok(()) };
    if !is_passed_over(known, shows) {
        return Ok(());
    }
    if let Role::Primary(store) = &gateway.role
        && let Err(error) = learn(gateway, store).await
    {
        tracing::debug!(%error, "epochs not read");
    }
    let detail = "its log has just opened another epoch";
    Err(if has_acted {
        Error::OutcomeUnknown { source: None }
    } else {
        Error::PrimaryUnreachable { detail, source: None }
    })
}

/// Whether what is shown counts in a newer epoch than what is known, and something is known.
pub fn is_passed_over(known: &Token, shows: &Token) -> bool {
    let knows_nothing = known.largest_position() == Position::ZERO && !known.claims_dropped();
    known.epoch() < shows.epoch() && !knows_nothing
}

/// Watches the log at the primary until `stop`: which epoch it is in, and whether it takes appends. Every
/// gateway of the region says so, whichever of them runs the relay.
pub async fn watch(gateway: Arc<Gateway>, readiness: Readiness, stop: CancellationToken) {
    let Role::Primary(store) = &gateway.role else { return };
    let mut epoch = store.watch_epoch();
    let mut ticks = tokio::time::interval(gateway.config.read.refresh_interval.get());
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            // Somebody met a newer epoch. The store outlives this loop, so the watch is not closed.
            _ = epoch.wait_for(|epoch| gateway.history().current() < *epoch) => {}
            _ = ticks.tick() => {}
        }
        let looked = stop.run_until_cancelled(look(&gateway, store));
        let condition = match looked.await {
            Some(Ok(head)) => taken(&gateway, &head),
            Some(Err(error)) => {
                // Not again at once, be the epoch ever so new.
                ticks.reset();
                ticks.tick().await;
                Condition::Degraded(format!("the log cannot be read: {error}"))
            }
            None => return,
        };
        readiness.set(LOG, condition);
    }
}

async fn look(gateway: &Gateway, store: &EventStore) -> Result<Head, ReadError> {
    let head = store.head().await?;
    if gateway.history().current() < head.at.epoch {
        learn(gateway, store).await?;
    }
    Ok(head)
}

fn taken(gateway: &Gateway, head: &Head) -> Condition {
    gateway.instruments.log(head.at.epoch.get(), head.refused_kind);
    match &head.refused_because {
        Some(reason) => Condition::Degraded(format!("appends are refused: {reason}")),
        None => Condition::Ready,
    }
}

#[cfg(test)]
mod tests {
    use consistency::Epoch;

    use super::*;

    #[test]
    fn only_who_knows_something_can_have_it_passed_over() {
        let second = Token::new(Epoch::new(2).unwrap());
        let first = Token::new(Epoch::FIRST);
        let read = |token: &Token| token.clone().with_read(Position::new(1).unwrap());
        assert!(is_passed_over(&read(&first), &second));
        assert!(is_passed_over(&first.clone().with_claims_forgotten(), &second));
        assert!(!is_passed_over(&first, &read(&second)));
        assert!(!is_passed_over(&read(&second), &first));
        assert!(!is_passed_over(&read(&second), &read(&second)));
    }
}
