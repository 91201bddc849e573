//! A log in memory, to run commands against.

use std::collections::BTreeMap;

use consistency::{
    AggregateId, CommittedAt, Epoch, Event, EventId, LogPosition, Name, Position, Version,
};
use projection::{CommandError, Domain, Folded};
use serde_json::{Value, json};
use uuid::Uuid;

pub const PLACED_AT: i64 = 1_700_000_000_000_000;

pub struct World {
    pub domain: Domain,
    pub log: Vec<Event>,
    states: BTreeMap<AggregateId, Folded>,
}

/// Why a command was refused.
#[derive(Debug, PartialEq, Eq)]
pub enum Refused {
    Malformed,
    Rule(&'static str),
}

pub fn aggregate(kind: &str, id: &str) -> AggregateId {
    AggregateId::new(Name::new(kind).unwrap(), id).unwrap()
}

impl World {
    pub fn empty() -> Self {
        Self { domain: orders::domain().unwrap(), log: Vec::new(), states: BTreeMap::new() }
    }

    /// Customer `ada`; product `pen` for 2.50, `desk` for 180.00 and `clip` for 0.01.
    pub fn furnished() -> Self {
        let mut world = Self::empty();
        world.does("RegisterCustomer", json!({"customer_id": "ada", "name": "Ada Lovelace"}));
        for (id, name, price_cents) in
            [("pen", "Pen", 250), ("desk", "Desk", 18_000), ("clip", "Clip", 1)]
        {
            let product = json!({"product_id": id, "name": name, "price_cents": price_cents});
            world.does("CreateProduct", product);
        }
        world
    }

    /// A furnished world with order `o-1` of four pens and a desk.
    pub fn with_order() -> Self {
        let mut world = Self::furnished();
        let items =
            json!([{"product_id": "pen", "quantity": 4}, {"product_id": "desk", "quantity": 1}]);
        world.does("PlaceOrder", json!({"order_id": "o-1", "customer_id": "ada", "items": items}));
        world
    }

    /// The types of the events that the command gave, which are now in the log.
    pub fn run(&mut self, command: &str, input: &Value) -> Result<Vec<String>, Refused> {
        let definition = self.domain.command(command).unwrap();
        let body = serde_json::to_vec(input).unwrap();
        let refused = |error| match error {
            CommandError::Malformed(_) => Refused::Malformed,
            CommandError::RuleViolated(broken) => Refused::Rule(broken.rule),
            CommandError::Unwritable(reason) => panic!("{reason}"),
        };
        let prepared = definition.prepare(&body).map_err(refused)?;
        let target = prepared.target().clone();
        let found: Vec<Folded> =
            prepared.lookups().iter().map(|known| self.replayed(known)).collect();
        let state = self.states.remove(&target).unwrap_or(Folded::nothing());
        let decided = prepared.run(&state, &found);
        self.states.insert(target.clone(), state);
        let mut types = Vec::new();
        for new in decided.map_err(refused)? {
            types.push(new.event_type.to_string());
            self.append(&target, new.event_type, new.schema_version, new.data);
        }
        Ok(types)
    }

    pub fn does(&mut self, command: &str, input: Value) -> Vec<String> {
        self.run(command, &input).unwrap_or_else(|refused| panic!("{command}: {refused:?}"))
    }

    pub fn refuses(&mut self, command: &str, input: Value) -> &'static str {
        let before = self.log.len();
        match self.run(command, &input) {
            Err(Refused::Rule(rule)) => {
                assert_eq!(self.log.len(), before, "a refused command leaves nothing");
                rule
            }
            other => panic!("{command} {input}: {other:?}"),
        }
    }

    pub fn state<S: Clone + 'static>(&self, kind: &str, id: &str) -> Option<S> {
        self.states.get(&aggregate(kind, id)).and_then(Folded::state).cloned()
    }

    pub fn order(&self) -> orders::Order {
        self.state("order", "o-1").unwrap()
    }

    pub fn history(&self, of: &AggregateId) -> Vec<Event> {
        self.log.iter().filter(|event| event.aggregate == *of).cloned().collect()
    }

    /// The state as the log alone tells it.
    pub fn replayed(&self, of: &AggregateId) -> Folded {
        let definition = self.domain.aggregate(of.kind().as_str()).unwrap();
        let fold = |folded, event: &Event| definition.fold(folded, event);
        self.history(of).iter().try_fold(Folded::nothing(), fold).unwrap()
    }

    fn append(
        &mut self,
        to: &AggregateId,
        event_type: Name,
        schema_version: consistency::SchemaVersion,
        data: String,
    ) {
        let state = self.states.remove(to).unwrap_or(Folded::nothing());
        let at = Position::new(self.log.len() as u64 + 1).unwrap();
        let event = Event {
            at: LogPosition::new(Epoch::FIRST, at),
            id: EventId::new(Uuid::from_u128(u128::from(at.get()))),
            previous_id: EventId::new(Uuid::from_u128(u128::from(at.previous().get()))),
            aggregate: to.clone(),
            version: Version::new(state.version().get() + 1).unwrap(),
            event_type,
            schema_version,
            committed_at: CommittedAt::from_unix_micros(PLACED_AT),
            correlation_id: Uuid::nil(),
            causation_id: Uuid::nil(),
            idempotency_key_hash: None,
            traceparent: None,
            data,
        };
        let definition = self.domain.aggregate(to.kind().as_str()).unwrap();
        let folded = definition.fold(state, &event).unwrap();
        self.states.insert(to.clone(), folded);
        self.log.push(event);
    }
}
