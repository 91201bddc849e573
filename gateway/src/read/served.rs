//! Answers from what was read here.

use std::collections::BTreeMap;

use bytes::Bytes;
use consistency::{LogPosition, Verdict, Version};
use http::{StatusCode, header};
use projection::sql::{ListAnswer, RollupAnswer, RowAnswer};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::value::RawValue;

use super::{Read, Seen, Target, evidence};
use crate::{
    answer::{Answer, JSON, read_of},
    error::Error,
    openapi::terms,
    pending, problem,
    read_models::{Found, Place, Question, Snapshot},
    status::{Outcome, Said},
};

/// An aggregate's row, as it stands in a page and alone.
#[derive(Serialize, JsonSchema)]
#[schemars(inline)]
pub struct Item<'a> {
    #[schemars(with = "terms::AggregateId")]
    key: &'a str,
    #[schemars(with = "terms::Version")]
    version: Version,
    #[schemars(with = "terms::Anything")]
    data: Box<RawValue>,
}

/// A page of a list, or of what a search finds.
#[derive(Serialize, JsonSchema)]
#[schemars(inline)]
pub struct Page<'a> {
    items: Vec<Item<'a>>,
    /// Leads to the next page; null on the last.
    next_cursor: Option<String>,
}

/// Sums and maxima.
#[derive(Serialize, JsonSchema)]
#[schemars(inline)]
pub struct Sums<'a> {
    key: &'a str,
    #[schemars(with = "BTreeMap<String, Option<i64>>")]
    data: BTreeMap<&'static str, Option<i64>>,
}

impl Read<'_> {
    /// What was seen as an answer, labelled by its verdict.
    pub(super) fn served(&self, seen: &Seen, verdict: Verdict) -> Result<Answer, Error> {
        match seen {
            Seen::Snapshot(snapshot) => self.snapshot_served(snapshot, verdict),
            Seen::Kept(kept) => Ok(self.kept_served(kept)),
        }
    }

    fn snapshot_served(&self, snapshot: &Snapshot, verdict: Verdict) -> Result<Answer, Error> {
        let at = evidence::shown(snapshot);
        let answer = match &snapshot.found {
            Found::Row(row) => self.row_served(row, snapshot.definition.version())?,
            Found::List(list) => self.page_served(list, at)?,
            Found::Rollup(rollup) => self.rollup_served(rollup, snapshot),
        };
        let (outcome, reason) = match verdict {
            // What was promised is there, and still the answer stands past an event that is not in it.
            Verdict::Current if evidence::holds_back(snapshot, self, at) => {
                (Outcome::Stale, Some("parked"))
            }
            Verdict::Current => (self.outcome, None),
            Verdict::Behind => (Outcome::Stale, Some("behind")),
            Verdict::Parked | Verdict::CurrentButParked => (Outcome::Stale, Some("parked")),
        };
        let answer = answer.saying(self.said(outcome, at, reason));
        Ok(match at {
            Some(at) => answer.showing(read_of(at)),
            None => answer,
        })
    }

    pub(super) fn said(
        &self,
        outcome: Outcome,
        at: Option<LogPosition>,
        reason: Option<&'static str>,
    ) -> Said {
        let ms = u64::try_from(self.call.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        Said { outcome, ms, region: self.gateway.config.region.clone(), at, reason }
    }

    fn row_served(&self, found: &RowAnswer, version: u32) -> Result<Answer, Error> {
        match &found.row {
            Some(row) => Ok(self.row_answer(version, row.at, row.version, &row.data)),
            None => Ok(self.absent()),
        }
    }

    /// A row, from a table or folded from the log: both are the same to who asked.
    pub(super) fn row_answer(
        &self,
        projection_version: u32,
        at: LogPosition,
        version: Version,
        data: &str,
    ) -> Answer {
        let tag = row_tag(projection_version, at);
        if self.call.has_tag(&tag) {
            return Answer::empty(StatusCode::NOT_MODIFIED).with_header(header::ETAG, &tag);
        }
        let body = row_body(&self.target.key, version, data);
        Answer::typed(StatusCode::OK, JSON, body).with_header(header::ETAG, &tag)
    }

    /// There is no such row, and that is as current as any answer.
    pub(super) fn absent(&self) -> Answer {
        problem::answer(&Error::NotFound, &self.gateway.config.region, &self.call.id)
    }

    fn page_served(&self, found: &ListAnswer, at: Option<LogPosition>) -> Result<Answer, Error> {
        let (Question::List { limit, .. } | Question::Search { limit, .. }) = &self.target.question
        else {
            return Ok(self.absent());
        };
        let limit = *limit as usize;
        let shown = &found.items[..found.items.len().min(limit)];
        let items = shown.iter().map(|item| {
            Ok(Item { key: &item.key, version: item.version, data: raw(item.data.clone())? })
        });
        let last = shown.last().filter(|_| limit < found.items.len());
        let next_cursor = last.map(|last| {
            let place = Place { created: last.created, aggregate_id: last.key.clone() };
            // What the first page showed is demanded of all that follow, each page's own included.
            let first = self.demand.at();
            let shown = at.map_or(first, |at| at.max(first));
            Target::cursor(&self.gateway.carrier, place, read_of(shown))
        });
        let items = items.collect::<Result<_, Error>>()?;
        Ok(Answer::json(StatusCode::OK, &Page { items, next_cursor }))
    }

    fn rollup_served(&self, found: &RollupAnswer, snapshot: &Snapshot) -> Answer {
        let Some(row) = &found.row else { return self.absent() };
        let columns = match snapshot.definition.kind() {
            projection::ProjectionKind::Rollup(rollup) => rollup.column_names().collect(),
            projection::ProjectionKind::Document(_) | projection::ProjectionKind::Custom(_) => {
                Vec::new()
            }
        };
        let data = columns.into_iter().zip(row.values.iter().copied()).collect();
        Answer::json(StatusCode::OK, &Sums { key: &self.target.key, data })
    }

    /// 202: the caller asked to be told instead of kept waiting. Shows nothing.
    pub(super) fn pending(&self) -> Result<Answer, Error> {
        let lag = self.prospects().lag();
        let answer = pending::answer(self.gateway, self.call, &lag, Some(&self.target.view));
        Ok(answer.saying(self.said(Outcome::Pending, lag.applied, None)))
    }
}

/// The tag of a row: which rules made it, and of which event it is.
pub(super) fn row_tag(projection_version: u32, at: LogPosition) -> String {
    format!("\"{projection_version}-{at}\"")
}

/// The body of a row's answer; `data` is JSON already.
pub(super) fn row_body(key: &str, version: Version, data: &str) -> Bytes {
    let mut body = Vec::with_capacity(data.len() + key.len() + 48);
    body.extend_from_slice(b"{\"key\":");
    serde_json::to_writer(&mut body, key).expect("text is written to memory");
    body.extend_from_slice(b",\"version\":");
    serde_json::to_writer(&mut body, &version).expect("a number is written to memory");
    body.extend_from_slice(b",\"data\":");
    body.extend_from_slice(data.as_bytes());
    body.push(b'}');
    body.into()
}

fn raw(data: String) -> Result<Box<RawValue>, Error> {
    RawValue::from_string(data).map_err(|error| Error::Internal(Box::new(error)))
}
