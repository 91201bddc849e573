//! What a read is of: the view, the row or the page, and so what it depends on.

mod search;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use consistency::{
    AggregateId, Demand, LogPosition, Name, Position, Scope, Token, TokenStatus, Version,
};
use projection::{LIST_KEY_BYTES_MAX, ProjectionDefinition, ViewDefinition, ViewKind};
use serde::{Deserialize, Serialize};

use crate::{
    currency::Partitions,
    error::Error,
    gateway::Gateway,
    memory::ViewPlace,
    read_models::{Place, Question},
    request::{self, Call},
    token_carrier::TokenCarrier,
};

/// What a read is of.
#[derive(Debug)]
pub struct Target {
    /// The projection that feeds the view.
    pub projection: Name,
    /// The newest version of it that this binary knows.
    pub newest_version: u32,
    /// The view.
    pub view: Name,
    /// Its place among all that the projection feeds.
    pub view_place: ViewPlace,
    /// Whether its rows are stored nowhere.
    pub is_on_demand: bool,
    /// The row's or the list's key.
    pub key: String,
    /// What the answer depends on.
    pub scope: Scope,
    /// What to ask of the database.
    pub question: Question,
    /// What the page before showed.
    after_page: Option<LogPosition>,
}

/// The way to the next page. It carries what its page showed, sealed, so that nobody can make a page
/// demand what was never shown.
#[derive(Debug, Serialize, Deserialize)]
struct Cursor {
    created: Position,
    key: String,
    token: String,
}

/// Longest cursor, in characters.
pub const CURSOR_CHARS_MAX: usize = 1024;

impl Target {
    /// Reads what a path and a query name.
    pub fn of(gateway: &Gateway, call: &Call, view: &str, key: &str) -> Result<Self, Error> {
        let (view, key) = (request::decoded(view)?, request::decoded(key)?.into_owned());
        let (definition, view) =
            gateway.domain.view(&view).ok_or_else(|| Error::UnknownView(view.into_owned()))?;
        let is_it = |known: &ViewDefinition| known.name() == view.name();
        let place = definition.views().iter().position(is_it).unwrap_or_default();
        let target = |scope, question, after_page| Self {
            projection: definition.name().clone(),
            newest_version: definition.version(),
            view: view.name().clone(),
            view_place: (definition.version(), place),
            is_on_demand: definition.is_on_demand(),
            key: key.clone(),
            scope,
            question,
            after_page,
        };
        match view.kind() {
            ViewKind::Row => {
                call.only_parameters(&["min_version"])?;
                let aggregate = AggregateId::new(definition.aggregate_type().clone(), key.as_str())
                    .map_err(|error| Error::BadRequest(format!("the key {error}")))?;
                let scope = Scope::Row(aggregate.key());
                Ok(target(scope, Question::Row(aggregate), None))
            }
            ViewKind::List => {
                check_key(&key)?;
                call.only_parameters(&["limit", "cursor"])?;
                let limit = page_limit(gateway, call)?;
                let (after, shown) = match call.parameter("cursor")? {
                    None => (Place { created: Position::ZERO, aggregate_id: String::new() }, None),
                    Some(cursor) => Self::after(gateway, &cursor)?,
                };
                let question = Question::List { key: key.clone(), after, limit };
                Ok(target(Scope::Everything, question, shown))
            }
            ViewKind::Rollup => {
                check_key(&key)?;
                call.only_parameters(&[])?;
                Ok(target(Scope::Everything, Question::Rollup(key.clone()), None))
            }
            ViewKind::Search(fields) => {
                let (question, shown) = search::question(gateway, call, &key, fields)?;
                Ok(target(Scope::Everything, question, shown))
            }
        }
    }

    fn after(gateway: &Gateway, cursor: &str) -> Result<(Place, Option<LogPosition>), Error> {
        let malformed = || Error::BadRequest("the cursor is not one of ours".to_owned());
        if CURSOR_CHARS_MAX < cursor.len() {
            return Err(malformed());
        }
        let bytes = URL_SAFE_NO_PAD.decode(cursor).map_err(|_| malformed())?;
        let cursor: Cursor = serde_json::from_slice(&bytes).map_err(|_| malformed())?;
        check_key(&cursor.key).map_err(|_| malformed())?;
        let token = match gateway.carrier.open_one(&cursor.token, &gateway.history()) {
            TokenStatus::Valid(token)
            | TokenStatus::OlderEpoch(token)
            | TokenStatus::NewerEpoch(token) => token,
            TokenStatus::UnknownKey(_) | TokenStatus::UnknownFormat(_) => {
                return Err(Error::TokenUnknownKey);
            }
            TokenStatus::Absent
            | TokenStatus::Lost(_)
            | TokenStatus::Malformed
            | TokenStatus::Forged
            | TokenStatus::OtherLog => return Err(malformed()),
        };
        let shown = LogPosition::new(token.epoch(), token.largest_position());
        Ok((Place { created: cursor.created, aggregate_id: cursor.key }, Some(shown)))
    }

    /// The cursor for the page after `last`, of a page that showed `shown`.
    pub fn cursor(carrier: &TokenCarrier, last: Place, shown: Token) -> String {
        let cursor =
            Cursor { created: last.created, key: last.aggregate_id, token: carrier.seal(&shown) };
        let text = serde_json::to_vec(&cursor).expect("a cursor has text keys only");
        URL_SAFE_NO_PAD.encode(text)
    }

    /// What the caller's token, its page before and its query ask of this read.
    pub fn demand(&self, call: &Call) -> Result<Demand, Error> {
        let mut demand = Demand::of(&call.token, self.scope);
        if let Some(shown) = self.after_page {
            demand = demand.with_position(shown);
        }
        if let (Scope::Row(_), Some(version)) = (self.scope, call.number("min_version")?) {
            let version = Version::new(version);
            let version =
                version.ok_or_else(|| Error::BadRequest("min_version is too large".to_owned()))?;
            demand = demand.with_min_version(version);
        }
        Ok(demand)
    }

    /// The partitions that matter, in the version of the projection that is read.
    pub fn partitions(&self, definition: Option<&ProjectionDefinition>) -> Partitions {
        match (&self.question, definition) {
            (Question::Row(aggregate), Some(definition)) => {
                Partitions::One(definition.partition_for(aggregate))
            }
            (Question::Row(_), None)
            | (Question::List { .. } | Question::Search { .. } | Question::Rollup(_), _) => {
                Partitions::All
            }
        }
    }

    /// The aggregate whose row it is.
    pub fn aggregate(&self) -> Option<&AggregateId> {
        match &self.question {
            Question::Row(aggregate) => Some(aggregate),
            Question::List { .. } | Question::Search { .. } | Question::Rollup(_) => None,
        }
    }
}

/// A key that no row can have is refused before the database would.
fn check_key(key: &str) -> Result<(), Error> {
    if (1..=LIST_KEY_BYTES_MAX).contains(&key.len()) && !key.contains(char::is_control) {
        return Ok(());
    }
    let bounds = format!("a key has 1 to {LIST_KEY_BYTES_MAX} bytes and no control characters");
    Err(Error::BadRequest(bounds))
}

fn page_limit(gateway: &Gateway, call: &Call) -> Result<u32, Error> {
    let bounds = &gateway.config.read;
    match call.number("limit")? {
        None => Ok(bounds.page_items_default),
        Some(limit) => {
            let max = bounds.page_items_max;
            let fits = u32::try_from(limit).ok().filter(|limit| (1..=max).contains(limit));
            fits.ok_or_else(|| Error::BadRequest(format!("limit must be from 1 to {max}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use consistency::{Event, PartitionCount};
    use projection::{Document, Fold, FoldError, Projection, Rows};

    use super::*;

    struct Nothing;

    impl Fold for Nothing {
        type State = ();
        type Event = ();

        fn fold(&self, _: Option<()>, (): (), _: &Event) -> Result<Option<()>, FoldError> {
            Ok(None)
        }
    }

    impl Document for Nothing {
        fn rows(&self, (): &(), _: &mut Rows<'_>) {}
    }

    #[test]
    fn a_row_depends_on_the_partition_that_its_projection_puts_it_in() {
        let in_two = |_: &AggregateId, _: PartitionCount| 2;
        let notes = || Projection::document("notes", 1, "note", Nothing).row("note").partitions(4);
        let own = notes().partitioned_by(in_two).build().unwrap();
        let usual = notes().build().unwrap();
        let aggregate = AggregateId::new(Name::new("note").unwrap(), "n-1").unwrap();
        let hashed = usual.partition_count().partition_of("n-1");
        assert_ne!(hashed, 2, "or the test says nothing");
        let target = Target {
            is_on_demand: false,
            projection: own.name().clone(),
            newest_version: 1,
            view_place: (1, 0),
            view: Name::new("note").unwrap(),
            key: "n-1".to_owned(),
            scope: Scope::Row(aggregate.key()),
            question: Question::Row(aggregate),
            after_page: None,
        };
        assert_eq!(target.partitions(Some(&own)), Partitions::One(2));
        assert_eq!(target.partitions(Some(&usual)), Partitions::One(hashed));
    }
}
