//! A projection as its developer declares it, and as the engine uses it.

use std::collections::BTreeSet;
use std::sync::Arc;

use consistency::{AggregateId, Name, PartitionCount, SchemaVersion};

use crate::custom::{ErasedCustom, TypedCustom};
use crate::document::ErasedDocument;
use crate::fold::TypedFold;
use crate::rollup::{Column, Combine, ErasedRollup, TypedRollup, TypedSummary};
use crate::sql::{IDENTIFIER_BYTES_MAX, Statements};
use crate::view::{LaterField, LaterValue};
use crate::{
    Custom, CustomDefinition, CustomTable, Document, DocumentDefinition, DomainError, Rollup,
    RollupDefinition, SearchFields, Summary, Upcasters, ViewDefinition, ViewKind,
};

const PARTITION_COUNT: u16 = 8;

/// Spreads aggregates over partitions. The same answer for the same aggregate for ever, in every
/// process; an answer beyond the count is taken modulo it.
pub type PartitionStrategy = fn(&AggregateId, PartitionCount) -> u16;

/// FNV-1a of the id, modulo the count.
fn by_id(aggregate: &AggregateId, count: PartitionCount) -> u16 {
    count.partition_of(aggregate.id())
}

/// A projection being declared. Mistakes are reported together, by [`Self::build`] or by
/// [`crate::DomainBuilder::build`].
#[must_use]
pub struct Projection {
    name: String,
    version: u32,
    aggregate_type: String,
    partition_count: u16,
    partition_strategy: PartitionStrategy,
    views: Vec<(String, ViewKind)>,
    later: Vec<(String, LaterField)>,
    is_on_demand: bool,
    rules: Rules,
    mistakes: Vec<String>,
}

enum Rules {
    Document(Arc<dyn ErasedDocument>),
    Rollup(Arc<dyn ErasedRollup>, Vec<Column>),
    Custom(Arc<dyn ErasedCustom>),
}

impl Projection {
    /// One state for each aggregate of one type, feeding any number of row and list views. `version`
    /// is from 1; another fold, state or row needs another version.
    pub fn document(
        name: &str,
        version: u32,
        aggregate_type: &str,
        document: impl Document,
    ) -> Self {
        let rules = Rules::Document(Arc::new(TypedFold(document)));
        Self::new(name, version, aggregate_type, rules)
    }

    /// Sums and maxima across the aggregates of one type, feeding one view.
    pub fn rollup(
        name: &str,
        version: u32,
        aggregate_type: &str,
        view: &str,
        rollup: impl Rollup,
    ) -> Self {
        let rules = Rules::Rollup(Arc::new(TypedRollup(rollup)), Vec::new());
        Self::new(name, version, aggregate_type, rules).view(view, ViewKind::Rollup)
    }

    /// Sums and maxima across the aggregates of one type, to which each adds by its state, feeding one
    /// view.
    pub fn summary(
        name: &str,
        version: u32,
        aggregate_type: &str,
        view: &str,
        summary: impl Summary,
    ) -> Self {
        let rules = Rules::Rollup(Arc::new(TypedSummary(TypedFold(summary))), Vec::new());
        Self::new(name, version, aggregate_type, rules).view(view, ViewKind::Rollup)
    }

    fn new(name: &str, version: u32, aggregate_type: &str, rules: Rules) -> Self {
        Self {
            name: name.to_owned(),
            version,
            aggregate_type: aggregate_type.to_owned(),
            partition_count: PARTITION_COUNT,
            partition_strategy: by_id,
            views: Vec::new(),
            later: Vec::new(),
            is_on_demand: false,
            rules,
            mistakes: Vec::new(),
        }
    }

    /// Whatever the developer writes when events of one aggregate type happen. It feeds no view of the
    /// gateway: its tables are read by others, who learn how current they are from its checkpoints.
    pub fn custom(name: &str, version: u32, aggregate_type: &str, custom: impl Custom) -> Self {
        let rules = Rules::Custom(Arc::new(TypedCustom(custom)));
        Self::new(name, version, aggregate_type, rules)
    }

    /// Stores nothing: its rows are folded from the log at the primary when they are read. For what is
    /// read seldom, or is too large to be kept everywhere. Only documents with row views can be.
    pub fn on_demand(mut self) -> Self {
        self.is_on_demand = true;
        self
    }

    /// Feeds a view of one row an aggregate, keyed by its id.
    pub fn row(self, view: &str) -> Self {
        self.document_view(view, ViewKind::Row)
    }

    /// Feeds a view of lists, each under a key that the document chooses.
    pub fn list(self, view: &str) -> Self {
        self.document_view(view, ViewKind::List)
    }

    /// Feeds a view of one row an aggregate, found by what is in it.
    pub fn search(mut self, view: &str, fields: SearchFields) -> Self {
        let SearchFields { words, number, label } = fields;
        for field in words.iter().chain([&number, &label]) {
            if !is_plain(field) {
                self.mistakes.push(format!("field {field:?} of {view} is not a plain name"));
            }
        }
        if words.is_empty() {
            self.mistakes.push(format!("{view} has no words to be found by"));
        }
        self.document_view(view, ViewKind::Search(fields))
    }

    /// A field that the rows of a view have got since this definition was first used: the same rules, one
    /// field more, the last of the row's. Until older rows are filled in (`backfill`), readers get what
    /// `value` makes of what they say. It must be what the document makes of the state, to the byte.
    pub fn later(mut self, view: &str, field: &'static str, value: LaterValue) -> Self {
        self.later.push((view.to_owned(), LaterField { name: field, value }));
        self
    }

    /// A column of a rollup that adds its deltas up.
    pub fn sum(self, column: &'static str) -> Self {
        self.column(column, Combine::Sum)
    }

    /// A column of a rollup that keeps the largest of its deltas.
    pub fn max(self, column: &'static str) -> Self {
        self.column(column, Combine::Max)
    }

    /// How many partitions share the work; 8 unless set. Another number counts from the next rebuild
    /// on: a version keeps the one that it was made with.
    pub fn partitions(mut self, count: u16) -> Self {
        self.partition_count = count;
        self
    }

    /// How aggregates are spread over the partitions; by a hash of their ids unless set. Another way
    /// needs another version: what one partition has applied, another would not know.
    pub fn partitioned_by(mut self, strategy: PartitionStrategy) -> Self {
        self.partition_strategy = strategy;
        self
    }

    fn document_view(mut self, view: &str, kind: ViewKind) -> Self {
        match self.rules {
            Rules::Document(_) => {}
            Rules::Rollup(..) => self.mistakes.push(format!("a rollup has no view like {view}")),
            Rules::Custom(_) => {
                self.mistakes.push(format!("a custom projection has no view {view}"))
            }
        }
        self.view(view, kind)
    }

    fn view(mut self, view: &str, kind: ViewKind) -> Self {
        self.views.push((view.to_owned(), kind));
        self
    }

    fn column(mut self, name: &'static str, combine: Combine) -> Self {
        match &mut self.rules {
            Rules::Document(_) => self.mistakes.push(format!("a document has no column {name}")),
            Rules::Rollup(_, columns) => columns.push(Column { name, combine }),
            Rules::Custom(_) => self.mistakes.push(format!("no rollup has column {name}")),
        }
        self
    }

    /// Checks it and makes the statements of its tables. Alone it knows no upcasters.
    pub fn build(self) -> Result<ProjectionDefinition, DomainError> {
        let said = format!("projection {}", self.name);
        let mut mistakes = self.mistakes;
        check_later(&self.later, &self.views, &mut mistakes);
        let mut named = |what: &str, name: String| match Name::new(name.as_str()) {
            Ok(name) => Some(name),
            Err(error) => {
                mistakes.push(format!("{what} {name:?} {error}"));
                None
            }
        };
        let name = named("name", self.name);
        let aggregate_type = named("aggregate type", self.aggregate_type);
        let views = self.views.into_iter().filter_map(|(view, kind)| {
            let later = later_of(&self.later, &view);
            Some(ViewDefinition::new(named("view", view)?, kind, later))
        });
        let views: Vec<ViewDefinition> = views.collect();
        let partition_count = PartitionCount::new(self.partition_count);
        if partition_count.is_none() {
            mistakes.push(format!("{} partitions", self.partition_count));
        }
        if self.version == 0 || i32::try_from(self.version).is_err() {
            mistakes.push(format!("version {}", self.version));
        }
        match &self.rules {
            Rules::Document(_) if views.is_empty() => mistakes.push("no view".to_owned()),
            Rules::Document(_) | Rules::Custom(_) => {}
            Rules::Rollup(_, columns) => check_columns(columns, &mut mistakes),
        }
        if self.is_on_demand {
            check_on_demand(&views, &mut mistakes);
        }
        let (Some(name), Some(aggregate_type), Some(partition_count), true) =
            (name, aggregate_type, partition_count, mistakes.is_empty())
        else {
            return Err(DomainError::of(&said, mistakes));
        };
        let views: Arc<[ViewDefinition]> = views.into();
        let kind = match self.rules {
            Rules::Document(document) => {
                ProjectionKind::Document(DocumentDefinition::new(document, Arc::clone(&views)))
            }
            Rules::Rollup(rollup, columns) => ProjectionKind::Rollup(RollupDefinition::new(
                rollup,
                views[0].clone(),
                columns.into(),
            )),
            Rules::Custom(custom) => ProjectionKind::Custom(CustomDefinition::new(custom)),
        };
        if let ProjectionKind::Custom(custom) = &kind {
            check_custom(&name, self.version, custom, &mut mistakes);
        }
        let statements = Statements::new(&name, self.version, &aggregate_type, &views, &kind);
        check_tables(&statements, &mut mistakes);
        if !mistakes.is_empty() {
            return Err(DomainError::of(&said, mistakes));
        }
        Ok(ProjectionDefinition {
            name,
            declared_version: self.version,
            version: self.version,
            aggregate_type,
            partition_count,
            partition_strategy: self.partition_strategy,
            views,
            is_on_demand: self.is_on_demand,
            kind,
            statements: Arc::new(statements),
        })
    }
}

/// Whether a name can stand in a statement as it is.
fn is_plain(name: &str) -> bool {
    let mut characters = name.bytes();
    characters.next().is_some_and(|c| c.is_ascii_lowercase())
        && characters.all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'_')
        && name.len() <= IDENTIFIER_BYTES_MAX
}

fn check_on_demand(views: &[ViewDefinition], mistakes: &mut Vec<String>) {
    if !views.iter().all(|view| view.kind() == ViewKind::Row) {
        mistakes.push("only rows can be made on demand".to_owned());
    }
    if views.is_empty() {
        mistakes.push("nothing to be made on demand".to_owned());
    }
}

fn later_of(later: &[(String, LaterField)], view: &str) -> Arc<[LaterField]> {
    later.iter().filter(|(of, _)| *of == view).map(|(_, field)| field.clone()).collect()
}

/// Fields are added to rows, and are looked for by name in statements.
fn check_later(
    later: &[(String, LaterField)],
    views: &[(String, ViewKind)],
    mistakes: &mut Vec<String>,
) {
    let mut seen = BTreeSet::new();
    for (view, LaterField { name, .. }) in later {
        let kind = views.iter().find(|(known, _)| known == view).map(|(_, kind)| kind);
        match kind {
            Some(ViewKind::Row | ViewKind::List | ViewKind::Search(_)) => {}
            Some(ViewKind::Rollup) | None => {
                mistakes.push(format!("no view of rows {view} that could get a field {name}"));
            }
        }
        if !is_plain(name) || !seen.insert((view, name)) {
            mistakes
                .push(format!("field {name:?} of {view} is there twice or is not a plain name"));
        }
    }
}

/// A column's name becomes an identifier beside those that every rollup has.
fn check_columns(columns: &[Column], mistakes: &mut Vec<String>) {
    let mut seen = BTreeSet::from(["key", "partition", "epoch", "position"]);
    for Column { name, .. } in columns {
        if !is_plain(name) || !seen.insert(name) {
            mistakes.push(format!("column {name:?} is taken or is not a plain name"));
        }
    }
    if columns.is_empty() {
        mistakes.push("no column".to_owned());
    }
}

/// The tables of a version go with it, so its name is in theirs.
fn check_custom(name: &Name, version: u32, custom: &CustomDefinition, mistakes: &mut Vec<String>) {
    let prefix = format!("{name}_v{version}_").replace('-', "_");
    for CustomTable { name, create } in custom.tables() {
        if !is_plain(name) || !name.starts_with(&prefix) {
            mistakes.push(format!("table {name} is not a plain name that begins with {prefix}"));
        }
        if !create.contains("create table if not exists") || !create.contains(name) {
            mistakes.push(format!("table {name} is not created if it does not exist"));
        }
    }
}

fn check_tables(statements: &Statements, mistakes: &mut Vec<String>) {
    let mut seen = BTreeSet::new();
    for table in statements.relations() {
        if table.len() > IDENTIFIER_BYTES_MAX {
            mistakes.push(format!("table {table} has more than {IDENTIFIER_BYTES_MAX} bytes"));
        }
        if !seen.insert(table) {
            mistakes.push(format!("two tables would be called {table}"));
        }
    }
}

/// A checked projection, its types erased: what the engine and the gateway use.
#[derive(Debug, Clone)]
pub struct ProjectionDefinition {
    name: Name,
    declared_version: u32,
    version: u32,
    aggregate_type: Name,
    partition_count: PartitionCount,
    partition_strategy: PartitionStrategy,
    views: Arc<[ViewDefinition]>,
    is_on_demand: bool,
    kind: ProjectionKind,
    statements: Arc<Statements>,
}

/// The rules of a projection.
#[derive(Debug, Clone)]
pub enum ProjectionKind {
    /// A state for each aggregate.
    Document(DocumentDefinition),
    /// Deltas across aggregates.
    Rollup(RollupDefinition),
    /// Whatever it writes.
    Custom(CustomDefinition),
}

impl ProjectionDefinition {
    /// The projection's name.
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// The version whose tables these are, from 1; fits a signed 32-bit column. As declared, unless
    /// this is an [`Self::instance`].
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The version that the rules were declared with.
    pub fn declared_version(&self) -> u32 {
        self.declared_version
    }

    /// The same rules for tables of another version, with so many partitions: what is built anew
    /// stands beside what it replaces. The tables of a custom projection bear the number that was
    /// declared, so it has no others.
    pub fn instance(
        &self,
        version: u32,
        partition_count: PartitionCount,
    ) -> Result<Self, DomainError> {
        let mut mistakes = Vec::new();
        if version == 0 || i32::try_from(version).is_err() {
            mistakes.push(format!("version {version}"));
        }
        match &self.kind {
            ProjectionKind::Custom(_) if version != self.declared_version => {
                mistakes.push("the tables of a custom projection bear its declared version".into());
            }
            ProjectionKind::Custom(_) | ProjectionKind::Document(_) | ProjectionKind::Rollup(_) => {
            }
        }
        let statements =
            Statements::new(&self.name, version, &self.aggregate_type, &self.views, &self.kind);
        check_tables(&statements, &mut mistakes);
        if !mistakes.is_empty() {
            return Err(DomainError::of(&format!("projection {}", self.name), mistakes));
        }
        Ok(Self { version, partition_count, statements: Arc::new(statements), ..self.clone() })
    }

    /// Whose events it is made of.
    pub fn aggregate_type(&self) -> &Name {
        &self.aggregate_type
    }

    /// How many partitions share the work.
    pub fn partition_count(&self) -> PartitionCount {
        self.partition_count
    }

    /// The partition that applies an aggregate's events; `None` when they are not of its type.
    pub fn partition_of(&self, aggregate: &AggregateId) -> Option<u16> {
        (*aggregate.kind() == self.aggregate_type).then(|| self.partition_for(aggregate))
    }

    /// The same for an aggregate that is known to be of its type.
    pub fn partition_for(&self, aggregate: &AggregateId) -> u16 {
        (self.partition_strategy)(aggregate, self.partition_count) % self.partition_count.get()
    }

    /// The views that it feeds.
    pub fn views(&self) -> &[ViewDefinition] {
        &self.views
    }

    /// Whether it is stored nowhere, and folded from the log when it is read.
    pub fn is_on_demand(&self) -> bool {
        self.is_on_demand
    }

    /// Its rules.
    pub fn kind(&self) -> &ProjectionKind {
        &self.kind
    }

    /// Its rules, when it is a document.
    pub fn document(&self) -> Option<&DocumentDefinition> {
        match &self.kind {
            ProjectionKind::Document(document) => Some(document),
            ProjectionKind::Rollup(_) | ProjectionKind::Custom(_) => None,
        }
    }

    /// Whether events of this type and schema version can be read by these rules. Where they cannot,
    /// another binary's may.
    pub fn knows(&self, event_type: &Name, schema: SchemaVersion) -> bool {
        match &self.kind {
            ProjectionKind::Document(document) => document.knows(event_type, schema),
            ProjectionKind::Rollup(rollup) => rollup.knows(event_type, schema),
            ProjectionKind::Custom(custom) => custom.knows(event_type, schema),
        }
    }

    /// The statements of its tables.
    pub fn statements(&self) -> &Statements {
        &self.statements
    }

    pub(crate) fn set_upcasters(&mut self, upcasters: &Arc<Upcasters>) {
        match &mut self.kind {
            ProjectionKind::Document(document) => document.set_upcasters(Arc::clone(upcasters)),
            ProjectionKind::Rollup(rollup) => rollup.set_upcasters(Arc::clone(upcasters)),
            ProjectionKind::Custom(custom) => custom.set_upcasters(Arc::clone(upcasters)),
        }
    }
}
