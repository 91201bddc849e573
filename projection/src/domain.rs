//! A whole domain: what both services are started with.

use std::collections::BTreeSet;
use std::sync::Arc;

use consistency::{Event, Name};
use schemars::JsonSchema;
use serde_json::value::RawValue;

use crate::fold::{ErasedFold, TypedFold, store};
use crate::{
    Command, CommandDefinition, Fold, Folded, Projection, ProjectionDefinition, ProjectionError,
    Schemas, StoredState, Upcast, Upcasters, ViewDefinition,
};

/// Everything that is wrong with a domain.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", .mistakes.join("; "))]
pub struct DomainError {
    mistakes: Vec<String>,
}

impl DomainError {
    pub(crate) fn of(what: &str, mistakes: Vec<String>) -> Self {
        Self {
            mistakes: mistakes.into_iter().map(|mistake| format!("{what}: {mistake}")).collect(),
        }
    }

    /// One sentence for each mistake.
    pub fn mistakes(&self) -> &[String] {
        &self.mistakes
    }
}

/// Aggregates, commands, projections and upcasters that go together.
#[derive(Debug, Clone)]
pub struct Domain {
    aggregates: Vec<AggregateDefinition>,
    commands: Vec<CommandDefinition>,
    projections: Vec<ProjectionDefinition>,
    upcasters: Arc<Upcasters>,
    schemas: Schemas,
}

impl Domain {
    /// Starts with nothing.
    pub fn builder() -> DomainBuilder {
        DomainBuilder::default()
    }

    /// Every aggregate type.
    pub fn aggregates(&self) -> &[AggregateDefinition] {
        &self.aggregates
    }

    /// One aggregate type.
    pub fn aggregate(&self, kind: &str) -> Option<&AggregateDefinition> {
        self.aggregates.iter().find(|known| known.kind().as_str() == kind)
    }

    /// Every command.
    pub fn commands(&self) -> &[CommandDefinition] {
        &self.commands
    }

    /// One command.
    pub fn command(&self, name: &str) -> Option<&CommandDefinition> {
        self.commands.iter().find(|known| known.name().as_str() == name)
    }

    /// Every version of every projection.
    pub fn projections(&self) -> &[ProjectionDefinition] {
        &self.projections
    }

    /// Every version of every projection that is stored in regions.
    pub fn stored(&self) -> impl Iterator<Item = &ProjectionDefinition> {
        self.projections.iter().filter(|known| !known.is_on_demand())
    }

    /// One version of a projection.
    pub fn projection(&self, name: &str, version: u32) -> Option<&ProjectionDefinition> {
        let is_it = |known: &&ProjectionDefinition| {
            known.name().as_str() == name && known.version() == version
        };
        self.projections.iter().find(is_it)
    }

    /// A view by its name, with the newest version of the projection that feeds it. Which version is
    /// read is not known here but to the region's database.
    pub fn view(&self, name: &str) -> Option<(&ProjectionDefinition, &ViewDefinition)> {
        let feeding = self.projections.iter().filter_map(|projection| {
            let is_it = |view: &&ViewDefinition| view.name().as_str() == name;
            Some((projection, projection.views().iter().find(is_it)?))
        });
        feeding.max_by_key(|(projection, _)| projection.version())
    }

    /// The steps that bring old events to their newest schema.
    pub fn upcasters(&self) -> &Upcasters {
        &self.upcasters
    }

    /// What its JSON looks like.
    pub fn schemas(&self) -> &Schemas {
        &self.schemas
    }
}

/// One aggregate type and its fold, its types erased.
#[derive(Clone)]
pub struct AggregateDefinition {
    kind: Name,
    version: u32,
    fold: Arc<dyn ErasedFold>,
    upcasters: Arc<Upcasters>,
}

impl std::fmt::Debug for AggregateDefinition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AggregateDefinition").field("kind", &self.kind).finish_non_exhaustive()
    }
}

impl AggregateDefinition {
    /// The aggregate type.
    pub fn kind(&self) -> &Name {
        &self.kind
    }

    /// The version of its rules, from 1; fits a signed 32-bit column.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The state after the next event; starts with [`Folded::nothing`].
    pub fn fold(&self, folded: Folded, event: &Event) -> Result<Folded, ProjectionError> {
        self.fold.fold(folded, event, &self.upcasters)
    }

    /// The state as JSON; `None` when the aggregate has none.
    pub fn state_json(&self, folded: &Folded) -> Result<Option<Box<RawValue>>, ProjectionError> {
        let raw = |text| {
            RawValue::from_string(text).map_err(|error| ProjectionError::State(error.to_string()))
        };
        self.fold.encode(folded)?.map(raw).transpose()
    }

    /// A state as it is stored, within its bound.
    pub fn store(&self, folded: &Folded) -> Result<StoredState, ProjectionError> {
        store(&*self.fold, folded)
    }

    /// A stored state as it was.
    pub fn restore(&self, stored: &StoredState) -> Result<Folded, ProjectionError> {
        self.fold.decode(stored)
    }
}

/// A domain being declared.
#[derive(Default)]
#[must_use]
pub struct DomainBuilder {
    aggregates: Vec<(String, u32, Arc<dyn ErasedFold>)>,
    commands: Vec<Result<CommandDefinition, String>>,
    projections: Vec<Projection>,
    upcasters: Upcasters,
    schemas: Schemas,
    mistakes: Vec<String>,
}

impl DomainBuilder {
    /// An aggregate type that commands change.
    pub fn aggregate(self, kind: &str, fold: impl Fold) -> Self {
        self.aggregate_version(kind, 1, fold)
    }

    /// The same by rules that are not the first of their type. States of long aggregates are kept; one
    /// that rules of another version made is not used. `version` is from 1, and rises with each change
    /// to the fold, to its state or to an upcaster of its events.
    pub fn aggregate_version(mut self, kind: &str, version: u32, fold: impl Fold) -> Self {
        self.aggregates.push((kind.to_owned(), version, Arc::new(TypedFold(fold))));
        self
    }

    /// A command.
    pub fn command<C: Command>(mut self) -> Self {
        self.commands.push(CommandDefinition::new::<C>());
        self
    }

    /// A projection. Several versions of one may stand beside each other.
    pub fn projection(mut self, projection: Projection) -> Self {
        self.projections.push(projection);
        self
    }

    /// What `data` of a view's rows looks like, for the API's description. One that is not said to look
    /// like anything may be anything.
    pub fn view_schema<T: JsonSchema>(mut self, view: &str) -> Self {
        self.schemas.view::<T>(view);
        self
    }

    /// The same for the state and the events of an aggregate type, by its rules.
    pub fn aggregate_schema<F>(mut self, kind: &str) -> Self
    where
        F: Fold<State: JsonSchema, Event: JsonSchema>,
    {
        self.schemas.aggregate::<F>(kind);
        self
    }

    /// The step that brings data of `event_type` from schema version `from` to the next. The steps of
    /// a type are given in order.
    pub fn upcaster(mut self, event_type: &str, from: u16, step: Upcast) -> Self {
        if !self.upcasters.add(event_type, from, step) {
            self.mistakes.push(format!("upcaster of {event_type} from {from} is out of order"));
        }
        self
    }

    /// Checks it all.
    pub fn build(self) -> Result<Domain, DomainError> {
        let mut mistakes = self.mistakes;
        let upcasters = Arc::new(self.upcasters);
        let mut aggregates = Vec::new();
        for (kind, version, fold) in self.aggregates {
            if version == 0 || i32::try_from(version).is_err() {
                mistakes.push(format!("aggregate type {kind}: version {version}"));
            }
            match Name::new(kind.as_str()) {
                Ok(kind) => {
                    let upcasters = Arc::clone(&upcasters);
                    aggregates.push(AggregateDefinition { kind, version, fold, upcasters });
                }
                Err(error) => mistakes.push(format!("aggregate type {kind:?} {error}")),
            }
        }
        let mut commands = Vec::new();
        for command in self.commands {
            match command {
                Ok(mut command) => {
                    command.set_upcasters(Arc::clone(&upcasters));
                    commands.push(command);
                }
                Err(mistake) => mistakes.push(mistake),
            }
        }
        let mut projections = Vec::new();
        for projection in self.projections {
            match projection.build() {
                Ok(mut projection) => {
                    projection.set_upcasters(&upcasters);
                    projections.push(projection);
                }
                Err(error) => mistakes.extend(error.mistakes),
            }
        }
        let schemas = self.schemas;
        let domain = Domain { aggregates, commands, projections, upcasters, schemas };
        domain.check_names(&mut mistakes);
        if mistakes.is_empty() { Ok(domain) } else { Err(DomainError { mistakes }) }
    }
}

impl Domain {
    fn check_names(&self, mistakes: &mut Vec<String>) {
        let kinds = self.aggregates.iter().map(|known| known.kind().to_string());
        check_once("aggregate type", kinds, mistakes);
        check_once("command", self.commands.iter().map(|known| known.name().to_string()), mistakes);
        let versions =
            self.projections.iter().map(|known| format!("{} v{}", known.name(), known.version()));
        check_once("projection", versions, mistakes);
        let tables = self.projections.iter().flat_map(|known| known.statements().tables());
        check_once("table", tables.map(str::to_owned), mistakes);
        let (views, kinds) = self.schemas.names();
        let views = views.filter(|view| self.view(view).is_none());
        mistakes.extend(views.map(|view| format!("schema of {view}, which is no view")));
        let kinds = kinds.filter(|kind| self.aggregate(kind).is_none());
        mistakes.extend(kinds.map(|kind| format!("schema of {kind}, which is no aggregate type")));
        for command in &self.commands {
            if self.aggregate(command.aggregate_type().as_str()).is_none() {
                let (name, kind) = (command.name(), command.aggregate_type());
                mistakes.push(format!("command {name} changes {kind}, which is no aggregate type"));
            }
        }
        for (at, one) in self.projections.iter().enumerate() {
            for other in &self.projections[..at] {
                self.check_pair(one, other, mistakes);
            }
        }
    }

    /// A view has one projection, and one kind through all versions of it.
    fn check_pair(
        &self,
        one: &ProjectionDefinition,
        other: &ProjectionDefinition,
        mistakes: &mut Vec<String>,
    ) {
        for view in one.views() {
            let Some(twin) = other.views().iter().find(|known| known.name() == view.name()) else {
                continue;
            };
            let same_type = one.aggregate_type() == other.aggregate_type();
            if one.name() != other.name() || view.kind() != twin.kind() || !same_type {
                mistakes.push(format!("view {} is declared in two ways", view.name()));
            }
        }
    }
}

fn check_once(what: &str, names: impl Iterator<Item = String>, mistakes: &mut Vec<String>) {
    let mut seen = BTreeSet::new();
    for name in names {
        if seen.contains(&name) {
            mistakes.push(format!("{what} {name} is declared twice"));
        }
        seen.insert(name);
    }
}
