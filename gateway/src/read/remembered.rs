//! Rows that are kept in memory: asked first, told what was read.

use std::sync::Arc;

use consistency::{Scope, Step, Verdict};
use http::{HeaderValue, StatusCode, header};

use super::{
    Facts, Read, Seen,
    served::{row_body, row_tag},
};
use crate::{
    answer::{Answer, JSON, read_of},
    currency::Partitions,
    epochs,
    memory::{Kept, KeptRow, Recalled, Shelf},
    read_models::{Found, Question, Snapshot},
    status::{CacheStatus, Forwarding},
};

impl Read<'_> {
    /// The row, when it is kept and what was heard since vouches for it. Who asks for the primary's
    /// newest is not answered from here.
    pub(super) fn recall(&mut self) -> Option<Facts> {
        let (Question::Row(aggregate), Scope::Row(key)) =
            (&self.target.question, self.target.scope)
        else {
            return None;
        };
        if self.wish.policy.steps().first() == Some(&Step::Primary) {
            return None;
        }
        let (memory, target) = (&self.gateway.memory, &self.target);
        let recalled =
            memory.recall(&target.projection, target.view_place, aggregate, &self.demand, key);
        let (status, kept) = match recalled {
            // Newer than what the caller was judged by: the database is asked, and then the epochs.
            Recalled::Hit(kept)
                if epochs::is_passed_over(&self.call.token, &read_of(kept.shown())) =>
            {
                (CacheStatus::Stale(Forwarding::default()), None)
            }
            Recalled::Hit(kept) => (CacheStatus::Hit, Some(kept)),
            Recalled::Stale => (CacheStatus::Stale(Forwarding::default()), None),
            Recalled::Miss => (CacheStatus::Miss(Forwarding::default()), None),
            Recalled::Off => (CacheStatus::Bypass, None),
        };
        self.cache = status;
        let seen = |kept| Facts {
            is_late: false,
            verdict: Verdict::Current,
            seen: Some(Seen::Kept(kept)),
            watermark: None,
        };
        kept.map(seen)
    }

    /// Keeps a row that was read, for those who ask next. `shelf` was the newest before it was read.
    pub(super) fn keep(&mut self, shelf: Option<&Shelf>, snapshot: &Snapshot) {
        let mut forwarding = Forwarding { stored: false, collapsed: snapshot.is_late };
        // Whoever asked first keeps it.
        if let (Some(shelf), false) = (shelf, snapshot.is_late) {
            let version = snapshot.definition.version();
            let kept = self.kept(snapshot);
            let place = self.target.view_place;
            forwarding.stored =
                kept.is_some_and(|kept| self.gateway.memory.keep(shelf, place, version, kept));
        }
        self.cache = self.cache.forwarded(forwarding);
    }

    /// What was read as it is kept. Nothing while something of it is parked: then an announcement that
    /// nothing has changed would not make it current.
    fn kept(&self, snapshot: &Snapshot) -> Option<Kept> {
        let (Found::Row(found), Question::Row(aggregate)) =
            (&snapshot.found, &self.target.question)
        else {
            return None;
        };
        let Partitions::One(partition) = self.target.partitions(Some(&snapshot.definition)) else {
            return None;
        };
        if found.parked.is_some() {
            return None;
        }
        let row = found.row.as_ref().map(|row| {
            let tag = row_tag(snapshot.definition.version(), row.at);
            KeptRow {
                version: row.version,
                at: row.at,
                body: row_body(&self.target.key, row.version, &row.data),
                tag: HeaderValue::from_str(&tag).expect("a tag is made of digits"),
            }
        });
        Some(Kept { read_at: found.checkpoint?, partition, aggregate: aggregate.clone(), row })
    }

    /// A row from memory. What it shows is what it showed when it was read.
    pub(super) fn kept_served(&self, kept: &Arc<Kept>) -> Answer {
        let at = kept.shown();
        let answer = match &kept.row {
            None => self.absent(),
            Some(row) => {
                let is_known = row.tag.to_str().is_ok_and(|tag| self.call.has_tag(tag));
                let mut answer = if is_known {
                    Answer::empty(StatusCode::NOT_MODIFIED)
                } else {
                    Answer::typed(StatusCode::OK, JSON, row.body.clone())
                };
                answer.headers.insert(header::ETAG, row.tag.clone());
                answer
            }
        };
        answer.saying(self.said(self.outcome, Some(at), None)).showing(read_of(at))
    }
}
