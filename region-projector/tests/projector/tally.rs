//! A small domain to project: tallies that are added to and moved between lists.

use consistency::Event;
use projection::{Deltas, Document, Domain, Fold, FoldError, Projection, Rollup, Rows};
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize)]
pub struct Tally {
    pub sum: i64,
    pub list: String,
}

#[derive(Serialize, Deserialize)]
pub enum TallyEvent {
    Added { n: i64 },
    Moved { to: String },
    Removed {},
}

struct Tallies;

impl Fold for Tallies {
    type State = Tally;
    type Event = TallyEvent;

    fn fold(
        &self,
        state: Option<Tally>,
        event: TallyEvent,
        _: &Event,
    ) -> Result<Option<Tally>, FoldError> {
        let mut tally = state.unwrap_or(Tally { sum: 0, list: "new".to_owned() });
        match event {
            TallyEvent::Added { n: 13 } => return Err(FoldError::new("thirteen is not added")),
            TallyEvent::Added { n } => tally.sum += n,
            TallyEvent::Moved { to } => tally.list = to,
            TallyEvent::Removed {} => return Ok(None),
        }
        Ok(Some(tally))
    }
}

impl Document for Tallies {
    fn rows(&self, tally: &Tally, rows: &mut Rows<'_>) {
        rows.row("tally", tally);
        rows.item("by-list", tally.list.as_str(), &tally.sum);
    }
}

struct Totals;

impl Rollup for Totals {
    type Event = TallyEvent;

    fn deltas(
        &self,
        event: TallyEvent,
        _: &Event,
        deltas: &mut Deltas<'_>,
    ) -> Result<(), FoldError> {
        match event {
            TallyEvent::Added { n: 13 } => return Err(FoldError::new("thirteen is not added")),
            TallyEvent::Added { n } => {
                deltas.add("all", "total", n);
                deltas.add("all", "largest", n);
            }
            TallyEvent::Moved { .. } | TallyEvent::Removed {} => {}
        }
        Ok(())
    }
}

/// The projection `tallies`, four partitions, version `version`.
pub fn domain_of(version: u32) -> Domain {
    let tallies = Projection::document("tallies", version, "tally", Tallies)
        .row("tally")
        .list("by-list")
        .partitions(4);
    Domain::builder().aggregate("tally", Tallies).projection(tallies).build().unwrap()
}

pub fn domain() -> Domain {
    domain_of(1)
}

/// The rollup `totals`, beside the tallies.
pub fn domain_with_totals() -> Domain {
    let tallies = Projection::document("tallies", 1, "tally", Tallies)
        .row("tally")
        .list("by-list")
        .partitions(4);
    let totals =
        Projection::rollup("totals", 1, "tally", "total", Totals).sum("total").max("largest");
    Domain::builder().projection(tallies).projection(totals).build().unwrap()
}

/// The tallies, and beside them the rollups `totals-a` and so on, as many as there are letters.
pub fn domain_with_totals_of(letters: &str) -> Domain {
    let tallies = Projection::document("tallies", 1, "tally", Tallies)
        .row("tally")
        .list("by-list")
        .partitions(4);
    let domain = Domain::builder().projection(tallies);
    let domain = letters.chars().fold(domain, |domain, letter| {
        let (name, view) = (format!("totals-{letter}"), format!("total-{letter}"));
        let totals = Projection::rollup(&name, 1, "tally", &view, Totals);
        domain.projection(totals.sum("total").max("largest"))
    });
    domain.build().unwrap()
}

/// Versions of the tallies and of the totals, each with its number of partitions.
pub fn domain_of_versions(versions: &[(u32, u16)]) -> Domain {
    let domain = versions.iter().fold(Domain::builder(), |domain, (version, partition_count)| {
        let tallies = Projection::document("tallies", *version, "tally", Tallies)
            .row("tally")
            .list("by-list")
            .partitions(*partition_count);
        let totals = Projection::rollup("totals", *version, "tally", "total", Totals)
            .sum("total")
            .max("largest")
            .partitions(*partition_count);
        domain.projection(tallies).projection(totals)
    });
    domain.build().unwrap()
}

/// What a later release knows: another event type, and a newer schema of `Added`.
#[derive(Serialize, Deserialize)]
pub enum NewerTallyEvent {
    Added { n: i64, times: i64 },
    Moved { to: String },
    Removed {},
    Doubled {},
}

/// Has nothing against thirteen.
struct NewerTallies;

impl Fold for NewerTallies {
    type State = Tally;
    type Event = NewerTallyEvent;

    fn fold(
        &self,
        state: Option<Tally>,
        event: NewerTallyEvent,
        _: &Event,
    ) -> Result<Option<Tally>, FoldError> {
        let mut tally = state.unwrap_or(Tally { sum: 0, list: "new".to_owned() });
        match event {
            NewerTallyEvent::Added { n, times } => tally.sum += n * times,
            NewerTallyEvent::Moved { to } => tally.list = to,
            NewerTallyEvent::Removed {} => return Ok(None),
            NewerTallyEvent::Doubled {} => tally.sum *= 2,
        }
        Ok(Some(tally))
    }
}

impl Document for NewerTallies {
    fn rows(&self, tally: &Tally, rows: &mut Rows<'_>) {
        Tallies.rows(tally, rows);
    }
}

/// The same version of `tallies` in a later release.
pub fn newer_domain() -> Domain {
    let tallies = Projection::document("tallies", 1, "tally", NewerTallies)
        .row("tally")
        .list("by-list")
        .partitions(4);
    let once = |mut data: serde_json::Value| {
        data["times"] = 1.into();
        Ok(data)
    };
    Domain::builder().projection(tallies).upcaster("Added", 1, once).build().unwrap()
}
