//! Commands: what a caller asks for, decided on the state of its aggregate.

use std::marker::PhantomData;
use std::sync::Arc;

use consistency::{AggregateId, Name, SchemaVersion};
use schemars::{JsonSchema, SchemaGenerator};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::decode::encode;
use crate::{Fold, Folded, SchemaOf, Upcasters};

/// One command: its fields are its input, decoded from the request's JSON. Mark it
/// `#[serde(deny_unknown_fields)]`, so that a misspelt field is refused.
/// Its schema is what callers are told of it.
pub trait Command: DeserializeOwned + JsonSchema + Send + Sync + 'static {
    /// What callers name it by.
    const NAME: &'static str;
    /// The type of the aggregate that it changes.
    const AGGREGATE_TYPE: &'static str;
    /// The rules of that type.
    type Aggregate: Fold<Event: Serialize>;

    /// The id of the aggregate that it changes.
    fn aggregate_id(&self) -> &str;

    /// Type and id of other aggregates whose state it needs.
    fn lookups(&self) -> Vec<(&'static str, &str)> {
        Vec::new()
    }

    /// Decides. Pure: the same state gives the same events. No events say that nothing is to be done.
    fn run(
        &self,
        state: Option<&<Self::Aggregate as Fold>::State>,
        found: &Found<'_>,
    ) -> Result<Vec<<Self::Aggregate as Fold>::Event>, CommandError>;
}

/// The states that a command asked for by [`Command::lookups`].
#[derive(Debug)]
pub struct Found<'a> {
    aggregates: &'a [AggregateId],
    states: &'a [Folded],
}

impl Found<'_> {
    /// The state of an aggregate; `None` when it has none or was not asked for.
    pub fn state<S: 'static>(&self, aggregate_type: &str, id: &str) -> Option<&S> {
        let is_it =
            |known: &AggregateId| known.kind().as_str() == aggregate_type && known.id() == id;
        let at = self.aggregates.iter().position(is_it)?;
        self.states.get(at)?.state()
    }
}

/// A rule of the domain that a command would break.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct RuleViolation {
    /// The rule's name, in kebab case; stable.
    pub rule: &'static str,
    /// What broke it. Shown to the caller.
    pub detail: String,
}

/// Why a command gives no events.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The input is not the command's; shown to the caller.
    #[error("malformed command: {0}")]
    Malformed(String),
    /// A rule forbids it.
    #[error("rule {} is broken", .0.rule)]
    RuleViolated(#[from] RuleViolation),
    /// The command's own code is at fault: its events do not encode, or break the bounds of names.
    #[error("command gave an event that cannot be written: {0}")]
    Unwritable(String),
}

impl CommandError {
    /// A broken rule.
    pub fn rule(rule: &'static str, detail: impl Into<String>) -> Self {
        Self::RuleViolated(RuleViolation { rule, detail: detail.into() })
    }
}

/// An event that a command decided on, to be appended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewEventData {
    /// Its type.
    pub event_type: Name,
    /// The newest schema version of that type.
    pub schema_version: SchemaVersion,
    /// JSON.
    pub data: String,
}

/// A command without its types.
#[derive(Clone)]
pub struct CommandDefinition {
    name: Name,
    aggregate_type: Name,
    schema: SchemaOf,
    command: Arc<dyn ErasedCommand>,
    upcasters: Arc<Upcasters>,
}

impl std::fmt::Debug for CommandDefinition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CommandDefinition").field("name", &self.name).finish_non_exhaustive()
    }
}

impl CommandDefinition {
    pub(crate) fn new<C: Command>() -> Result<Self, String> {
        let name = |text| Name::new(text).map_err(|error| format!("command name {text:?} {error}"));
        Ok(Self {
            name: name(C::NAME)?,
            aggregate_type: name(C::AGGREGATE_TYPE)?,
            schema: SchemaGenerator::subschema_for::<C>,
            command: Arc::new(TypedCommand::<C>(PhantomData)),
            upcasters: Arc::default(),
        })
    }

    pub(crate) fn set_upcasters(&mut self, upcasters: Arc<Upcasters>) {
        self.upcasters = upcasters;
    }

    /// What callers name it by.
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// The type of the aggregate that it changes.
    pub fn aggregate_type(&self) -> &Name {
        &self.aggregate_type
    }

    /// What its input looks like.
    pub fn schema(&self) -> SchemaOf {
        self.schema
    }

    /// Reads a request's body.
    pub fn prepare(&self, body: &[u8]) -> Result<Prepared, CommandError> {
        self.command.prepare(body, &self.aggregate_type, &self.upcasters)
    }
}

/// A command with its input, ready to run as often as its append conflicts.
pub struct Prepared {
    target: AggregateId,
    lookups: Vec<AggregateId>,
    command: Box<dyn ErasedInput>,
    upcasters: Arc<Upcasters>,
}

impl std::fmt::Debug for Prepared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prepared")
            .field("target", &self.target)
            .field("lookups", &self.lookups)
            .finish_non_exhaustive()
    }
}

impl Prepared {
    /// The aggregate that it changes.
    pub fn target(&self) -> &AggregateId {
        &self.target
    }

    /// Other aggregates whose state it needs, each once.
    pub fn lookups(&self) -> &[AggregateId] {
        &self.lookups
    }

    /// Decides on the target's state and the states of [`Self::lookups`] in their order. The events
    /// are to be appended with the version of `state` as the expected one.
    pub fn run(
        &self,
        state: &Folded,
        lookups: &[Folded],
    ) -> Result<Vec<NewEventData>, CommandError> {
        let found = Found { aggregates: &self.lookups, states: lookups };
        let events = self.command.run(state, &found)?;
        let written = |(event_type, data): (String, String)| {
            let schema_version = self.upcasters.current(&event_type);
            let event_type = Name::new(event_type)
                .map_err(|error| CommandError::Unwritable(error.to_string()))?;
            Ok(NewEventData { event_type, schema_version, data })
        };
        events.into_iter().map(written).collect()
    }
}

trait ErasedCommand: Send + Sync {
    fn prepare(
        &self,
        body: &[u8],
        aggregate_type: &Name,
        upcasters: &Arc<Upcasters>,
    ) -> Result<Prepared, CommandError>;
}

trait ErasedInput: Send + Sync {
    fn run(&self, state: &Folded, found: &Found<'_>)
    -> Result<Vec<(String, String)>, CommandError>;
}

struct TypedCommand<C>(PhantomData<fn() -> C>);
struct TypedInput<C>(C);

impl<C: Command> ErasedCommand for TypedCommand<C> {
    fn prepare(
        &self,
        body: &[u8],
        aggregate_type: &Name,
        upcasters: &Arc<Upcasters>,
    ) -> Result<Prepared, CommandError> {
        let input: C = serde_json::from_slice(body)
            .map_err(|error| CommandError::Malformed(error.to_string()))?;
        let named = |kind: Name, id: &str| {
            AggregateId::new(kind, id)
                .map_err(|error| CommandError::Malformed(format!("id {id:?} {error}")))
        };
        let target = named(aggregate_type.clone(), input.aggregate_id())?;
        let mut lookups = Vec::new();
        for (kind, id) in input.lookups() {
            let kind =
                Name::new(kind).map_err(|error| CommandError::Unwritable(error.to_string()))?;
            let aggregate = named(kind, id)?;
            if !lookups.contains(&aggregate) {
                lookups.push(aggregate);
            }
        }
        let command = Box::new(TypedInput(input));
        Ok(Prepared { target, lookups, command, upcasters: Arc::clone(upcasters) })
    }
}

impl<C: Command> ErasedInput for TypedInput<C> {
    fn run(
        &self,
        state: &Folded,
        found: &Found<'_>,
    ) -> Result<Vec<(String, String)>, CommandError> {
        let typed = state.state::<<C::Aggregate as Fold>::State>();
        if typed.is_none() && state.exists() {
            let reason = "the state is of another aggregate type".to_owned();
            return Err(CommandError::Unwritable(reason));
        }
        let events = self.0.run(typed, found)?;
        let encoded = events.iter().map(encode);
        encoded
            .collect::<Result<_, _>>()
            .map_err(|error| CommandError::Unwritable(error.to_string()))
    }
}
