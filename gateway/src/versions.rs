//! The versions of projections that were met in the region's database.
//!
//! Which version is read, by which rules it was built and with how many partitions is for the database
//! to say. What is known of a version never changes, since its number is never given again, so it is
//! learnt once.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, PoisonError, RwLock},
};

use consistency::{Name, PartitionCount};
use projection::{Domain, ProjectionDefinition, sql::ViewStatements};

use crate::gather::{GatherBounds, Line};

/// Versions of one projection that are remembered; the oldest are forgotten first, since a number that
/// is not read any more never comes back but by a rollback.
const KNOWN_COUNT_MAX: usize = 8;

/// What is known.
#[derive(Debug)]
pub struct Versions {
    /// By projection.
    declared: BTreeMap<Name, Projection>,
    gather: Option<GatherBounds>,
}

#[derive(Debug, Default)]
struct Projection {
    declared: Vec<ProjectionDefinition>,
    known: RwLock<BTreeMap<u32, Arc<KnownVersion>>>,
}

/// One version.
#[derive(Debug)]
pub struct KnownVersion {
    /// Its rules, over its own tables.
    pub definition: Arc<ProjectionDefinition>,
    /// Where reads of its row views are gathered, by the place of the view. Empty when every read asks
    /// for itself.
    pub lines: HashMap<usize, Arc<Line>>,
}

impl Versions {
    /// Knows the rules of a domain, and no version yet.
    pub fn new(domain: &Domain, gather: Option<GatherBounds>) -> Self {
        let mut declared: BTreeMap<Name, Projection> = BTreeMap::new();
        for definition in domain.stored() {
            let projection = declared.entry(definition.name().clone()).or_default();
            projection.declared.push(definition.clone());
        }
        Self { declared, gather }
    }

    /// A version that was learnt.
    pub fn get(&self, projection: &Name, version: u32) -> Option<Arc<KnownVersion>> {
        let known = &self.declared.get(projection)?.known;
        known.read().unwrap_or_else(PoisonError::into_inner).get(&version).cloned()
    }

    /// The database says by which rules a version was built. `None` when they are not in this binary.
    pub fn learn(
        &self,
        projection: &Name,
        version: u32,
        definition: u32,
        partition_count: u16,
    ) -> Option<Arc<KnownVersion>> {
        if let Some(known) = self.get(projection, version) {
            return Some(known);
        }
        let of = self.declared.get(projection)?;
        let rules = of.declared.iter().find(|rules| rules.declared_version() == definition)?;
        let made = rules.instance(version, PartitionCount::new(partition_count)?).ok()?;
        let lines = self.gather.map(|bounds| lines(&made, bounds)).unwrap_or_default();
        let learnt = Arc::new(KnownVersion { definition: Arc::new(made), lines });
        let mut known = of.known.write().unwrap_or_else(PoisonError::into_inner);
        let learnt = Arc::clone(known.entry(version).or_insert(learnt));
        while KNOWN_COUNT_MAX < known.len() {
            known.pop_first();
        }
        Some(learnt)
    }
}

fn lines(definition: &ProjectionDefinition, bounds: GatherBounds) -> HashMap<usize, Arc<Line>> {
    let views = definition.statements().views.iter().enumerate();
    let rows = views.filter_map(|(view, statements)| match statements {
        ViewStatements::Row(rows) => Some((view, Arc::clone(&rows.read_many))),
        ViewStatements::List(_) | ViewStatements::Rollup(_) | ViewStatements::Search(_) => None,
    });
    rows.map(|(view, statement)| (view, Arc::new(Line::new(statement, bounds)))).collect()
}
