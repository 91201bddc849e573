//! What every request of one gateway shares.

use std::{collections::BTreeMap, sync::Arc};

use arc_swap::{ArcSwap, Guard};
use consistency::{EpochHistory, LogPosition, Name, Policy};
use event_store::EventStore;
use projection::Domain;
use tokio::{sync::Semaphore, time::Instant};

use crate::{
    config::GatewayConfig, currency::Currency, events::Listeners, feed::Seen, log_rate::LogRate,
    memory::Memory, proxied::Routes, read_models::ReadModels, telemetry::Instruments,
    token_carrier::TokenCarrier, upstream::Upstream,
};

/// One gateway.
#[derive(Debug)]
pub struct Gateway {
    /// As configured.
    pub config: GatewayConfig,
    /// The name under which gateways of this region go in `Via`.
    pub proxy_name: String,
    /// What callers may ask for.
    pub domain: Arc<Domain>,
    /// Opens and seals tokens.
    pub carrier: TokenCarrier,
    /// What this region has applied.
    pub currency: Currency,
    /// The rows.
    pub read_models: ReadModels,
    /// Rows that were read before.
    pub memory: Memory,
    /// What the last look at the database showed.
    pub seen: Seen,
    /// What it measures.
    pub instruments: Instruments,
    /// The log, or the way to it.
    pub role: Role,
    /// Requests under way.
    pub requests: Semaphore,
    /// How fast regions are given the log.
    pub log_rate: Arc<LogRate>,
    /// Paths that lead to services of the user's own.
    pub routes: Routes,
    /// Who listens to events.
    pub listeners: Listeners,
    /// When those who must know were last asked for epochs, held while they are.
    pub epochs_asked_at: tokio::sync::Mutex<Option<Instant>>,
    history: ArcSwap<EpochHistory>,
    policies: BTreeMap<String, Policy>,
    policy: Policy,
}

/// The log, or the way to it.
#[derive(Debug)]
pub enum Role {
    /// This is the primary.
    Primary(EventStore),
    /// It is elsewhere.
    Region(Box<Upstream>),
}

impl Gateway {
    /// Puts the parts together. Policies were checked with the configuration; one that does not read
    /// is the shipped one.
    pub fn new(
        config: GatewayConfig,
        domain: Arc<Domain>,
        carrier: TokenCarrier,
        read_models: ReadModels,
        instruments: Instruments,
        role: Role,
        routes: Routes,
    ) -> Self {
        let parsed = |text: &str| Policy::parse(text).unwrap_or_else(|_| Policy::shipped());
        let views = config.views.iter();
        let policies = views.map(|(view, of)| (view.clone(), parsed(&of.policy))).collect();
        let projections = || domain.stored().map(|known| known.name().clone());
        let currency = Currency::new(projections(), config.read.waiter_bounds());
        let memory = Memory::new(
            projections(),
            config.read.memory_bytes_max,
            config.read.memory_slots_per_partition,
        );
        let requests = Semaphore::new(config.listen.requests_max.min(Semaphore::MAX_PERMITS));
        let policy = parsed(&config.read.policy);
        let log_rate = Arc::new(LogRate::new(config.regions.log_bytes_per_second_max));
        let listeners = Listeners::new(config.events.listeners_max);
        let history = ArcSwap::from_pointee(EpochHistory::first());
        Self {
            proxy_name: format!("tidemark-{}", config.region),
            config,
            domain,
            carrier,
            currency,
            read_models,
            memory,
            seen: Seen::default(),
            instruments,
            role,
            requests,
            log_rate,
            routes,
            listeners,
            epochs_asked_at: tokio::sync::Mutex::default(),
            history,
            policies,
            policy,
        }
    }

    /// The epochs known here. Every request asks several times, on every processor: to take it writes to
    /// nothing that they share.
    pub fn history(&self) -> Guard<Arc<EpochHistory>> {
        self.history.load()
    }

    /// Epochs never become fewer: a history that ends earlier is an older reading.
    pub fn learn_history(&self, history: EpochHistory) {
        let history = Arc::new(history);
        let newer = |known: &Arc<EpochHistory>| {
            Arc::clone(if known.current() < history.current() { &history } else { known })
        };
        if self.history.rcu(newer).current() < history.current() {
            tracing::info!(epoch = %history.current(), "a newer epoch is known");
        }
    }

    /// The chain of a view for callers who do not say.
    pub fn policy_of(&self, view: &Name) -> &Policy {
        self.policies.get(view.as_str()).unwrap_or(&self.policy)
    }

    /// The largest position that the log is known to have reached.
    pub fn head(&self) -> LogPosition {
        match &self.role {
            // Here nobody needs to be believed.
            Role::Primary(store) => store.head_seen(),
            Role::Region(_) => self.currency.head(),
        }
    }

    /// Where a read is being decided.
    pub fn place(&self) -> consistency::Place {
        match &self.role {
            Role::Primary(_) => consistency::Place::Primary,
            Role::Region(upstream) if upstream.is_available(Instant::now()) => {
                consistency::Place::Region
            }
            Role::Region(_) => consistency::Place::RegionAlone,
        }
    }
}
