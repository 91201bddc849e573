//! What has happened to an order, made when somebody asks.

use consistency::Event;
use projection::{Document, Fold, FoldError, Rows};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::OrderEvent;

/// A row of `order-history`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct OrderHistory {
    /// Everything that happened, the first first.
    pub entries: Vec<HistoryEntry>,
}

/// One thing that happened to an order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HistoryEntry {
    /// The event's type.
    pub what: String,
    /// What the order lost or gained: a product's id, or the reason of a cancellation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// When, in microseconds since 1970 by the log's clock.
    pub at_unix_us: i64,
}

/// The rules of the projection `order-history`, which nobody reads often enough to keep it everywhere.
pub(crate) struct Histories;

impl Fold for Histories {
    type State = OrderHistory;
    type Event = OrderEvent;

    fn fold(
        &self,
        state: Option<OrderHistory>,
        event: OrderEvent,
        envelope: &Event,
    ) -> Result<Option<OrderHistory>, FoldError> {
        let mut history = state.unwrap_or_default();
        let detail = match event {
            OrderEvent::OrderPlaced { .. }
            | OrderEvent::OrderShipped {}
            | OrderEvent::OrderDelivered {} => None,
            OrderEvent::ItemAdded(line) => Some(line.product_id),
            OrderEvent::ItemRemoved { product_id, .. } => Some(product_id),
            OrderEvent::OrderCancelled { reason } => reason,
        };
        let what = envelope.event_type.to_string();
        let at_unix_us = envelope.committed_at.unix_micros();
        history.entries.push(HistoryEntry { what, detail, at_unix_us });
        Ok(Some(history))
    }
}

impl Document for Histories {
    fn rows(&self, history: &OrderHistory, rows: &mut Rows<'_>) {
        rows.row("order-history", history);
    }
}
