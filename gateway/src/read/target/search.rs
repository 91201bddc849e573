//! Searches: what is looked for is in the query.

use consistency::{LogPosition, Position};
use projection::{LIST_KEY_BYTES_MAX, SearchFields};

use super::{Target, page_limit};
use crate::{
    error::Error,
    gateway::Gateway,
    read_models::{Filter, Place, Question},
    request::Call,
};

/// Reads `?q=`, the filters that are named after the view's fields, `limit` and `cursor`. With the
/// question comes what the page before showed.
pub(super) fn question(
    gateway: &Gateway,
    call: &Call,
    key: &str,
    fields: SearchFields,
) -> Result<(Question, Option<LogPosition>), Error> {
    if !key.is_empty() {
        return Err(Error::BadRequest("a search has no key: ask with ?q=".to_owned()));
    }
    let SearchFields { number, label, .. } = fields;
    let (least, most) = (format!("{number}_min"), format!("{number}_max"));
    call.only_parameters(&["q", &least, &most, label, "limit", "cursor"])?;
    let filter = Filter {
        words: text(call, "q")?.unwrap_or_default(),
        number_min: whole(call, &least)?,
        number_max: whole(call, &most)?,
        label: text(call, label)?,
    };
    let limit = page_limit(gateway, call)?;
    let (after, shown) = match call.parameter("cursor")? {
        None => (Place { created: Position::ZERO, aggregate_id: String::new() }, None),
        Some(cursor) => Target::after(gateway, &cursor)?,
    };
    Ok((Question::Search { filter, after, limit }, shown))
}

/// A text that the database takes.
fn text(call: &Call, name: &str) -> Result<Option<String>, Error> {
    let text = call.parameter(name)?;
    let fits = |text: &String| text.len() <= LIST_KEY_BYTES_MAX && !text.contains(char::is_control);
    if text.as_ref().is_none_or(fits) {
        return Ok(text);
    }
    let bounds = format!("{name} has at most {LIST_KEY_BYTES_MAX} bytes, no control characters");
    Err(Error::BadRequest(bounds))
}

fn whole(call: &Call, name: &str) -> Result<Option<i64>, Error> {
    let wrong = |_| Error::BadRequest(format!("{name} must be a whole number"));
    call.parameter(name)?.map(|text| text.parse().map_err(wrong)).transpose()
}
