//! Properties of judgement and decision, each held against an oracle that knows the log.
//!
//! The oracle never looks at what the rules look at: a snapshot is the set of events that it has, and
//! a caller is the set of events that it wrote or saw.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use consistency::{
    AggregateKey, Budget, Chain, Claim, Decision, Demand, Epoch, Evidence, IdleProof, LogPosition,
    Parked, Place, Policy, Preference, Refusal, Scope, Step, Token, Verdict, Version, decide,
    judge, watermark,
};
use proptest::prelude::*;

const AGGREGATE_COUNT: usize = 6;
const PARTITION_COUNT: usize = 2;

/// The log: the aggregate of each event, positions from 1.
type Log = Vec<usize>;

/// One caller's past, in order.
#[derive(Debug, Clone)]
enum Deed {
    /// It wrote the event at this place of the log.
    Wrote(usize),
    /// It saw a row made by all events of its aggregate up to this place.
    SawRow(usize),
    /// It saw everything up to this place.
    SawAll(usize),
}

/// What a snapshot of a region has: a checkpoint for each partition, and aggregates parked somewhere.
#[derive(Debug, Clone)]
struct Snapshot {
    checkpoints: [usize; PARTITION_COUNT],
    /// Rows may be ahead of nothing: an aggregate is parked from this place on.
    parked: Vec<(usize, usize)>,
}

impl Snapshot {
    /// Whether the event at a place is in the rows.
    fn has(&self, log: &Log, place: usize) -> bool {
        let aggregate = log[place - 1];
        let parked = self.parked.iter().any(|(which, from)| *which == aggregate && *from <= place);
        place <= self.checkpoints[aggregate % PARTITION_COUNT] && !parked
    }

    fn version(&self, log: &Log, aggregate: usize) -> u64 {
        let places = 1..=log.len();
        places.filter(|place| log[place - 1] == aggregate && self.has(log, *place)).count() as u64
    }

    fn evidence(&self, log: &Log, read: Option<usize>) -> Evidence {
        let mark = match read {
            Some(aggregate) => self.checkpoints[aggregate % PARTITION_COUNT],
            None => *self.checkpoints.iter().min().unwrap(),
        };
        let touched = self.parked.iter().filter(|(which, _)| read.is_none_or(|row| row == *which));
        let parked = touched.map(|(which, from)| {
            let position = at(*from).position;
            Parked { aggregate: key(*which), position }
        });
        let version = read.map(|aggregate| self.version(log, aggregate));
        Evidence {
            watermark: Some(at(mark)),
            row_version: version.filter(|version| *version > 0).and_then(Version::new),
            parked: parked.collect(),
        }
    }
}

fn at(place: usize) -> LogPosition {
    LogPosition::new(Epoch::FIRST, (place as u64).try_into().unwrap())
}

fn key(aggregate: usize) -> AggregateKey {
    AggregateKey::from_bytes([aggregate as u8; 12])
}

fn version_at(log: &Log, place: usize) -> u64 {
    log[..place].iter().filter(|aggregate| **aggregate == log[place - 1]).count() as u64
}

/// The token of a caller, as answers would have built it, and the places it knows.
fn caller(log: &Log, deeds: &[Deed]) -> (Token, Vec<usize>) {
    let mut knows = Vec::new();
    let token = deeds.iter().fold(Token::new(Epoch::FIRST), |token, deed| match *deed {
        Deed::Wrote(place) => {
            knows.push(place);
            token.with_claim(Claim {
                aggregate: key(log[place - 1]),
                version: Version::new(version_at(log, place)).unwrap(),
                position: at(place).position,
            })
        }
        Deed::SawRow(place) => {
            let same = (1..=place).filter(|other| log[other - 1] == log[place - 1]);
            knows.extend(same);
            token.with_read(at(place).position)
        }
        Deed::SawAll(place) => {
            knows.extend(1..=place);
            token.with_read(at(place).position)
        }
    });
    (token, knows)
}

fn log_and_past() -> impl Strategy<Value = (Log, Vec<Deed>, Snapshot)> {
    proptest::collection::vec(0..AGGREGATE_COUNT, 1..12).prop_flat_map(|log| {
        let length = log.len();
        let deed = (0..4, 1..=length).prop_map(|(kind, place)| match kind {
            0 | 1 => Deed::Wrote(place),
            2 => Deed::SawRow(place),
            _ => Deed::SawAll(place),
        });
        let deeds = proptest::collection::vec(deed, 0..8);
        // Only what was read can be parked.
        let parked = proptest::collection::vec(1..=length, 0..2);
        let checkpoints = [0..=length, 0..=length];
        let snapshot = (checkpoints, parked).prop_map({
            let log = log.clone();
            move |(checkpoints, parked)| {
                let place_of = |place: &usize| (log[place - 1], *place);
                let read = |(aggregate, from): &(usize, usize)| {
                    *from <= checkpoints[aggregate % PARTITION_COUNT]
                };
                Snapshot { checkpoints, parked: parked.iter().map(place_of).filter(read).collect() }
            }
        });
        (Just(log), deeds, snapshot)
    })
}

fn any_verdict() -> impl Strategy<Value = Verdict> {
    prop_oneof![
        Just(Verdict::Current),
        Just(Verdict::Behind),
        Just(Verdict::Parked),
        Just(Verdict::CurrentButParked)
    ]
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        proptest::option::of(0..3000_u32).prop_map(|ms| Step::Wait { ms }),
        Just(Step::Forward),
        Just(Step::Pending),
        Just(Step::Primary),
        Just(Step::Eventual)
    ]
}

fn any_policy() -> impl Strategy<Value = Policy> {
    proptest::collection::vec(any_step(), 1..=8).prop_map(|steps| Policy::new(steps).unwrap())
}

fn any_budget() -> impl Strategy<Value = Budget> {
    let place = prop_oneof![Just(Place::Region), Just(Place::RegionAlone), Just(Place::Primary)];
    let ms = || proptest::option::of(0..2000_u32);
    (0..2000_u32, 0..1000_u32, place, ms()).prop_map(
        |(left_ms, wait_ms_max, place, worth_waiting_ms)| Budget {
            left_ms,
            wait_ms_max,
            place,
            worth_waiting_ms,
        },
    )
}

fn any_scope() -> impl Strategy<Value = Scope> {
    prop_oneof![Just(Scope::Row(key(1))), Just(Scope::Everything)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_row_is_current_only_with_every_event_of_it_that_the_caller_knows(
        (log, deeds, snapshot) in log_and_past(), aggregate in 0..AGGREGATE_COUNT
    ) {
        let (token, knows) = caller(&log, &deeds);
        let scope = Scope::Row(key(aggregate));
        let verdict = judge(&Demand::of(&token, scope), scope, &snapshot.evidence(&log, Some(aggregate)));
        let mut owed = knows.iter().filter(|place| log[**place - 1] == aggregate);
        if verdict == Verdict::Current {
            prop_assert!(owed.all(|place| snapshot.has(&log, *place)), "{knows:?} {token:?}");
        }
        prop_assert_ne!(verdict, Verdict::CurrentButParked, "a row is not served without its events");
    }

    #[test]
    fn a_list_is_current_only_with_every_event_that_the_caller_knows(
        (log, deeds, snapshot) in log_and_past()
    ) {
        let (token, knows) = caller(&log, &deeds);
        let scope = Scope::Everything;
        let verdict = judge(&Demand::of(&token, scope), scope, &snapshot.evidence(&log, None));
        let missing: Vec<usize> = knows.into_iter().filter(|place| !snapshot.has(&log, *place)).collect();
        match verdict {
            Verdict::Current => prop_assert!(missing.is_empty(), "{missing:?} {token:?}"),
            Verdict::CurrentButParked => {
                let parked = |place: &usize| snapshot.parked.iter().any(|(which, _)| *which == log[place - 1]);
                prop_assert!(missing.iter().all(parked), "{missing:?} {token:?}");
                let wrote = |place: &usize| deeds.iter().any(|deed| matches!(deed, Deed::Wrote(own) if own == place));
                prop_assert!(!missing.iter().any(wrote), "its writer is not passed over: {token:?}");
            }
            Verdict::Behind | Verdict::Parked => {}
        }
    }

    #[test]
    fn a_read_is_not_held_back_by_what_nobody_asked_for(
        (log, deeds, snapshot) in log_and_past(), aggregate in 0..AGGREGATE_COUNT
    ) {
        let (token, _) = caller(&log, &deeds);
        let scope = Scope::Row(key(aggregate));
        let complete = Snapshot { checkpoints: [log.len(); PARTITION_COUNT], parked: Vec::new() };
        let verdict = judge(&Demand::of(&token, scope), scope, &complete.evidence(&log, Some(aggregate)));
        prop_assert_eq!(verdict, Verdict::Current);
        let nobody = judge(&Demand::none(), scope, &snapshot.evidence(&log, Some(aggregate)));
        prop_assert_eq!(nobody, Verdict::Current);
    }

    #[test]
    fn a_merged_token_owes_what_either_owed(
        (log, deeds, snapshot) in log_and_past(), split in 0..8_usize, aggregate in 0..AGGREGATE_COUNT
    ) {
        let (first, second) = deeds.split_at(split.min(deeds.len()));
        let merged = caller(&log, first).0.merge(caller(&log, second).0);
        let (_, knows) = caller(&log, &deeds);
        let scope = Scope::Row(key(aggregate));
        let verdict = judge(&Demand::of(&merged, scope), scope, &snapshot.evidence(&log, Some(aggregate)));
        let mut owed = knows.iter().filter(|place| log[**place - 1] == aggregate);
        if verdict == Verdict::Current {
            prop_assert!(owed.all(|place| snapshot.has(&log, *place)), "{knows:?} {merged:?}");
        }
    }

    #[test]
    fn a_demand_with_a_position_is_met_only_there(
        (log, deeds, snapshot) in log_and_past(), place in 0..12_usize, aggregate in 0..AGGREGATE_COUNT
    ) {
        let (token, _) = caller(&log, &deeds);
        let scope = Scope::Row(key(aggregate));
        let demand = Demand::of(&token, scope).with_position(at(place));
        let verdict = judge(&demand, scope, &snapshot.evidence(&log, Some(aggregate)));
        if verdict == Verdict::Current {
            let mut all = (1..=place.min(log.len())).filter(|place| log[place - 1] == aggregate);
            prop_assert!(all.all(|place| snapshot.has(&log, place)));
        }
    }

    #[test]
    fn a_watermark_claims_no_event_that_is_not_stored(
        (log, _, _) in log_and_past(), stored in 0..12_usize, fallen in 0..12_usize
    ) {
        // An honest proof: the partition of aggregate 0 read on from `stored` to the next of its events.
        let own = |place: &usize| log[place - 1] % PARTITION_COUNT == 0;
        let stored = stored.min(log.len());
        let next = (stored + 1..=log.len()).find(own);
        let proof = IdleProof { stored: at(stored), proven: at(next.map_or(log.len(), |next| next - 1)) };
        let checkpoint = fallen.min(log.len());
        let mark = watermark(Some(at(checkpoint)), Some(proof)).unwrap();
        let claimed = (checkpoint + 1..=log.len()).find(|place| own(place) && at(*place) <= mark);
        prop_assert_eq!(claimed, None);
    }

    #[test]
    fn only_a_current_verdict_is_served_and_stale_is_never_hidden(
        verdict in any_verdict(), scope in any_scope(), policy in any_policy(), budget in any_budget()
    ) {
        let mut chain = Chain::new(&policy);
        // Each step is used once, and one more decision ends the chain.
        for _ in 0..=policy.steps().len() {
            let decision = decide(verdict, scope, &mut chain, &budget);
            match decision {
                Decision::Serve => prop_assert_eq!(verdict, Verdict::Current),
                Decision::ServeStale => prop_assert!(
                    verdict == Verdict::CurrentButParked || policy.steps().contains(&Step::Eventual)
                ),
                Decision::Pending => prop_assert!(policy.allows_pending()),
                Decision::Wait { ms } => {
                    prop_assert!(0 < ms && ms <= budget.left_ms);
                    prop_assert!(ms <= budget.wait_ms_max || budget.place == Place::Primary);
                    prop_assert_eq!(verdict == Verdict::Current, false);
                    continue;
                }
                Decision::Forward => {
                    prop_assert_eq!(budget.place, Place::Region);
                    continue;
                }
                Decision::Fold => {
                    prop_assert!(budget.place == Place::Primary && matches!(scope, Scope::Row(_)));
                    continue;
                }
                Decision::Linearize => {
                    prop_assert!(policy.steps().contains(&Step::Primary));
                    continue;
                }
                Decision::Refuse(refusal) => {
                    prop_assert!(refusal != Refusal::Parked || verdict == Verdict::Parked);
                }
            }
            return Ok(());
        }
        prop_assert!(false, "the chain did not end: {policy}");
    }

    #[test]
    fn the_same_facts_give_the_same_choice(
        verdict in any_verdict(), scope in any_scope(), policy in any_policy(), budget in any_budget()
    ) {
        let (mut first, mut second) = (Chain::new(&policy), Chain::new(&policy));
        for _ in 0..policy.steps().len() {
            let once = decide(verdict, scope, &mut first, &budget);
            prop_assert_eq!(once, decide(verdict, scope, &mut second, &budget));
        }
    }

    #[test]
    fn a_policy_is_read_as_it_is_written(policy in any_policy()) {
        prop_assert_eq!(Policy::parse(&policy.to_string()).unwrap(), policy);
    }

    #[test]
    fn a_policy_of_any_text_is_read_or_refused(text in "[ -~]{0,40}") {
        if let Ok(policy) = Policy::parse(&text) {
            prop_assert_eq!(Policy::parse(&policy.to_string()).unwrap(), policy);
        }
    }

    #[test]
    fn a_preference_keeps_the_chain_within_its_bound(
        policy in any_policy(), wait_ms in proptest::option::of(0..9000_u32), respond_async: bool
    ) {
        let preferred = policy.preferring(Preference { wait_ms, respond_async });
        prop_assert!(Policy::new(preferred.steps().to_vec()).is_ok());
        prop_assert!(!respond_async || preferred.allows_pending());
        let first = preferred.steps()[0];
        let wait = Step::Wait { ms: wait_ms };
        prop_assert!(wait_ms.is_none() || first == wait);
    }
}
