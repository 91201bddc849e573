use consistency::{Scope, Token};

use super::*;

mod stress;

fn name() -> Name {
    Name::new("orders").unwrap()
}

fn position(value: u64) -> Position {
    Position::new(value).unwrap()
}

fn at(value: u64) -> LogPosition {
    LogPosition::new(Epoch::FIRST, position(value))
}

fn aggregate(id: u64) -> AggregateId {
    AggregateId::new(Name::new("order").unwrap(), format!("o-{id}")).unwrap()
}

fn observation(version: u32, checkpoints: &[u64]) -> Observation {
    let checkpoints = (0..).zip(checkpoints.iter().map(|position| Some(at(*position))));
    Observation { moment: 0, version, partition_count: 4, checkpoints: checkpoints.collect() }
}

fn announcement(version: u32, partition: u16, from: u64, to: u64, ids: &[u64]) -> Announcement {
    Announcement {
        region: "eu-west".to_owned(),
        epoch: Epoch::FIRST,
        projection: name(),
        version,
        partition,
        from: position(from),
        to: position(to),
        stored: position(to),
        head: position(to),
        keys: Some(ids.iter().map(|id| aggregate(*id).key().hint()).collect()),
    }
}

fn kept(id: u64, partition: u16, read_at: u64, row_at: Option<u64>) -> Kept {
    let row = row_at.map(|row_at| KeptRow {
        version: Version::new(row_at).unwrap(),
        at: at(row_at),
        body: Bytes::from_static(b"{}"),
        tag: HeaderValue::from_static("\"1-1.1\""),
    });
    Kept { read_at: at(read_at), partition, aggregate: aggregate(id), row }
}

fn demand(at: u64) -> Demand {
    let token = Token::new(Epoch::FIRST).with_read(position(at));
    Demand::of(&token, Scope::Everything)
}

fn recall(memory: &Memory, id: u64, demand: &Demand) -> Recalled {
    let aggregate = aggregate(id);
    memory.recall(&name(), (1, 0), &aggregate, demand, aggregate.key())
}

fn keep(memory: &Memory, version: u32, kept: Kept) -> bool {
    let shelf = memory.shelf(&name()).unwrap();
    memory.keep(&shelf, (1, 0), version, kept)
}

fn is_hit(recalled: &Recalled) -> bool {
    matches!(recalled, Recalled::Hit(_))
}

fn memory() -> Memory {
    let memory = Memory::new([name()], 1 << 20, 64);
    memory.observed(&name(), &observation(1, &[5, 5, 5, 5]), Source::Poll);
    memory
}

#[test]
fn a_row_is_shown_until_it_is_touched_and_to_nobody_who_knows_more() {
    let memory = memory();
    assert_eq!(recall(&memory, 1, &demand(0)), Recalled::Miss);
    assert!(keep(&memory, 1, kept(1, 0, 5, Some(3))) && keep(&memory, 1, kept(2, 0, 5, None)));
    assert!(is_hit(&recall(&memory, 1, &demand(5))) && is_hit(&recall(&memory, 2, &demand(5))));
    assert_eq!(recall(&memory, 1, &demand(6)), Recalled::Stale, "past what was heard");
    memory.hear(&announcement(1, 0, 5, 7, &[2]));
    assert!(is_hit(&recall(&memory, 1, &demand(7))), "it was not touched");
    assert_eq!(recall(&memory, 2, &demand(0)), Recalled::Stale, "there may be a row by now");
    assert!(!keep(&memory, 1, kept(1, 0, 4, Some(3))), "a newer one is there");
}

#[test]
fn a_row_that_holds_the_callers_write_is_shown_wherever_the_chain_stands() {
    let memory = memory();
    keep(&memory, 1, kept(1, 0, 5, Some(3)));
    let key = aggregate(1).key();
    let wrote = |version| {
        let version = Version::new(version).unwrap();
        let claim = consistency::Claim { aggregate: key, version, position: position(9) };
        Demand::of(&Token::new(Epoch::FIRST).with_claim(claim), Scope::Row(key))
    };
    assert!(is_hit(&recall(&memory, 1, &wrote(3))));
    assert_eq!(recall(&memory, 1, &wrote(4)), Recalled::Stale);
    let by_hand = |version| demand(0).with_min_version(Version::new(version).unwrap());
    assert!(is_hit(&recall(&memory, 1, &by_hand(3))));
    assert_eq!(recall(&memory, 1, &by_hand(4)), Recalled::Stale);
    memory.hear(&announcement(1, 0, 5, 6, &[1]));
    assert_eq!(recall(&memory, 1, &wrote(3)), Recalled::Stale, "a newer row is known of");
}

/// The row that is kept may hold events that the newer epoch lost: its version counts others then.
#[test]
fn a_row_of_an_older_epoch_proves_nothing_to_who_wrote_in_a_newer_one() {
    let memory = memory();
    keep(&memory, 1, kept(1, 0, 5, Some(3)));
    let (key, version) = (aggregate(1).key(), Version::new(3).unwrap());
    let claim = consistency::Claim { aggregate: key, version, position: position(4) };
    let wrote = |epoch| Demand::of(&Token::new(epoch).with_claim(claim), Scope::Row(key));
    assert!(is_hit(&recall(&memory, 1, &wrote(Epoch::FIRST))));
    let newer = Epoch::new(2).unwrap();
    assert_eq!(recall(&memory, 1, &wrote(newer)), Recalled::Stale);
}

/// Keys in memory are hashes.
#[test]
fn a_row_of_another_aggregate_under_the_same_key_is_not_shown() {
    let memory = memory();
    keep(&memory, 1, kept(1, 0, 5, Some(3)));
    let shown = |id| memory.recall(&name(), (1, 0), &aggregate(id), &demand(0), aggregate(1).key());
    assert!(is_hit(&shown(1)));
    assert_eq!(shown(2), Recalled::Miss);
}

#[test]
fn another_version_knows_nothing_of_what_was_kept() {
    let memory = memory();
    let old = memory.shelf(&name()).unwrap();
    keep(&memory, 1, kept(1, 0, 5, Some(3)));
    memory.observed(&name(), &observation(2, &[5, 5, 5, 5]), Source::Read);
    assert_eq!(recall(&memory, 1, &demand(0)), Recalled::Miss);
    assert!(!keep(&memory, 1, kept(1, 0, 5, Some(3))), "read from tables that are not read now");
    memory.keep(&old, (1, 0), 1, kept(1, 0, 5, Some(3)));
    assert_eq!(recall(&memory, 1, &demand(0)), Recalled::Miss, "a late one");
    assert!(keep(&memory, 2, kept(1, 0, 5, Some(3))));
    assert!(is_hit(&recall(&memory, 1, &demand(5))));
    let newer = LogPosition::new(Epoch::new(2).unwrap(), position(5));
    let adopted = Observation { checkpoints: vec![(0, Some(newer))], ..observation(2, &[]) };
    memory.observed(&name(), &adopted, Source::Read);
    assert_eq!(recall(&memory, 1, &demand(0)), Recalled::Miss, "of an older epoch");
}

#[test]
fn a_poll_makes_rows_useless_only_when_something_was_missed() {
    let memory = memory();
    keep(&memory, 1, kept(1, 0, 5, Some(3)));
    memory.observed(&name(), &observation(1, &[8]), Source::Poll);
    memory.hear(&announcement(1, 0, 5, 8, &[]));
    assert!(is_hit(&recall(&memory, 1, &demand(8))), "what was announced after the poll");
    memory.observed(&name(), &observation(1, &[9]), Source::Poll);
    memory.observed(&name(), &observation(1, &[9]), Source::Read);
    assert!(is_hit(&recall(&memory, 1, &demand(8))));
    memory.observed(&name(), &observation(1, &[9]), Source::Poll);
    assert_eq!(recall(&memory, 1, &demand(0)), Recalled::Stale, "9 was never announced");
}

#[test]
fn memory_that_is_switched_off_or_full_keeps_no_more() {
    let off = Memory::new([name()], 0, 64);
    off.observed(&name(), &observation(1, &[5]), Source::Poll);
    assert!(off.shelf(&name()).is_none());
    assert_eq!(recall(&off, 1, &demand(0)), Recalled::Off);
    let small = Memory::new([name()], 10_000, 64);
    small.observed(&name(), &observation(1, &[5, 5, 5, 5]), Source::Poll);
    (0..1000).for_each(|id| {
        keep(&small, 1, kept(id, 0, 5, Some(3)));
    });
    let entries = small.entries.as_ref().unwrap();
    entries.run_pending_tasks();
    assert!(entries.weighted_size() <= 10_000, "{}", entries.weighted_size());
}
