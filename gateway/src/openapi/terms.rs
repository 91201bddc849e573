//! The words of the API as JSON Schema: what the types of `consistency` look like in JSON, with the bounds that
//! their constructors check.
#![expect(dead_code, reason = "they are described and never made")]

use consistency::{AGGREGATE_ID_BYTES_MAX, NAME_BYTES_MAX};
use schemars::JsonSchema;

/// What a signed column holds.
const POSITION_MAX: u64 = i64::MAX as u64;
/// A letter, then letters, digits, `-` and `_`.
pub const NAME_PATTERN: &str = "^[A-Za-z][A-Za-z0-9_-]*$";
/// Visible ASCII without `/`.
pub const ID_PATTERN: &str = "^[!-.0-~]+$";

/// Place of an event in the global log: dense, in commit order; 0 is before the first.
#[derive(JsonSchema)]
pub struct Position(#[schemars(range(min = 0, max = POSITION_MAX))] u64);

/// Count of events of one aggregate; 0 is before the first.
#[derive(JsonSchema)]
pub struct Version(#[schemars(range(min = 0, max = POSITION_MAX))] u64);

/// Incarnation of the log, from 1.
#[derive(JsonSchema)]
pub struct Epoch(#[schemars(range(min = 1, max = i32::MAX))] u32);

/// A name that a developer chose.
#[derive(JsonSchema)]
pub struct Name(
    #[schemars(length(min = 1, max = NAME_BYTES_MAX), regex(pattern = NAME_PATTERN))] String,
);

/// Id of an aggregate within its type.
#[derive(JsonSchema)]
pub struct AggregateId(
    #[schemars(length(min = 1, max = AGGREGATE_ID_BYTES_MAX), regex(pattern = ID_PATTERN))] String,
);

/// Id of an event.
#[derive(JsonSchema)]
pub struct EventId(#[schemars(extend("format" = "uuid"))] String);

/// Version of the schema of an event's data, from 1.
#[derive(JsonSchema)]
pub struct SchemaVersion(#[schemars(range(min = 1, max = i16::MAX))] u16);

/// Any JSON: what it is, is the domain's business.
#[derive(JsonSchema)]
#[schemars(inline)]
pub struct Anything(serde_json::Value);
