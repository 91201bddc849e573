//! Orders: their state and the events that make it.

use consistency::Event;
use projection::{Fold, FoldError};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// An order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Order {
    /// Who ordered.
    pub customer_id: String,
    /// The customer's name when the order was placed.
    pub customer_name: String,
    /// How far it is.
    pub status: Status,
    /// What its prices are in.
    #[serde(default)]
    pub currency: Currency,
    /// One line for each product, never empty.
    pub items: Vec<Line>,
    /// When it was placed, in microseconds since 1970 by the log's clock.
    pub placed_at_unix_us: i64,
}

/// How far an order is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// May still be changed.
    Placed,
    /// On its way.
    Shipped,
    /// At the customer's.
    Delivered,
    /// Called off.
    Cancelled,
}

impl Status {
    /// The key of its list in `orders-by-status`, and its form in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Placed => "placed",
            Self::Shipped => "shipped",
            Self::Delivered => "delivered",
            Self::Cancelled => "cancelled",
        }
    }
}

/// What prices are in. There is one, so that every sum is of one currency; an order in another is
/// refused wherever it comes from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Currency {
    /// Euro, in cents.
    #[default]
    #[serde(rename = "EUR")]
    Eur,
}

/// A product in an order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Line {
    /// Which.
    pub product_id: String,
    /// The product's name when it was added.
    pub product_name: String,
    /// The product's price when it was added. An order has one price for a product.
    pub unit_price_cents: u64,
    /// How many.
    pub quantity: u32,
}

/// What can happen to an order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OrderEvent {
    /// The first event. The upcasters know its older schemas.
    OrderPlaced {
        /// Who ordered.
        customer_id: String,
        /// The customer's name.
        customer_name: String,
        /// What its prices are in.
        currency: Currency,
        /// What its items cost together.
        total_cents: u64,
        /// One line for each product.
        items: Vec<Line>,
    },
    /// More of a product, which may be new to the order.
    ItemAdded(Line),
    /// Less of a product, or none of it any more.
    ItemRemoved {
        /// Which.
        product_id: String,
        /// How many less.
        quantity: u32,
    },
    /// Left the warehouse.
    OrderShipped {},
    /// Arrived.
    OrderDelivered {},
    /// Called off.
    OrderCancelled {
        /// In the customer's words.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
    },
}

impl Line {
    /// What it costs; `None` when that leaves 64 bits.
    pub fn total_cents(&self) -> Option<u64> {
        self.unit_price_cents.checked_mul(u64::from(self.quantity))
    }
}

impl Order {
    /// What it costs; `None` when that leaves 64 bits.
    pub fn total_cents(&self) -> Option<u64> {
        total_cents(&self.items)
    }

    /// The line of a product.
    pub fn line(&self, product_id: &str) -> Option<&Line> {
        self.items.iter().find(|line| line.product_id == product_id)
    }

    fn after(mut self, event: OrderEvent) -> Result<Self, FoldError> {
        match event {
            OrderEvent::OrderPlaced { .. } => {
                return Err(FoldError::new("order is placed already"));
            }
            OrderEvent::ItemAdded(line) => self.add(line)?,
            OrderEvent::ItemRemoved { product_id, quantity } => {
                self.remove(&product_id, quantity)?;
            }
            OrderEvent::OrderShipped {} => self.status = Status::Shipped,
            OrderEvent::OrderDelivered {} => self.status = Status::Delivered,
            OrderEvent::OrderCancelled { .. } => self.status = Status::Cancelled,
        }
        Ok(self)
    }

    fn add(&mut self, added: Line) -> Result<(), FoldError> {
        let known = self.items.iter_mut().find(|line| line.product_id == added.product_id);
        match known {
            None => self.items.push(added),
            Some(line) if line.unit_price_cents == added.unit_price_cents => {
                line.quantity = (line.quantity.checked_add(added.quantity))
                    .ok_or_else(|| FoldError::new("quantity leaves 32 bits"))?;
            }
            Some(_) => return Err(FoldError::new("product has another price in this order")),
        }
        Ok(())
    }

    fn remove(&mut self, product_id: &str, quantity: u32) -> Result<(), FoldError> {
        let at = self.items.iter().position(|line| line.product_id == product_id);
        let at = at.ok_or_else(|| FoldError::new("product is not in the order"))?;
        let left = (self.items[at].quantity.checked_sub(quantity))
            .ok_or_else(|| FoldError::new("more is removed than the order has"))?;
        if left == 0 {
            self.items.remove(at);
        } else {
            self.items[at].quantity = left;
        }
        Ok(())
    }
}

/// What lines cost together; `None` when that leaves 64 bits.
pub(crate) fn total_cents(items: &[Line]) -> Option<u64> {
    items.iter().try_fold(0_u64, |total, line| total.checked_add(line.total_cents()?))
}

/// The rules of aggregate type `order`. Whether an event should have happened was its command's to
/// decide: the fold takes it as a fact and only refuses what makes no sense.
#[derive(Debug, Clone, Copy)]
pub struct Orders;

impl Fold for Orders {
    type State = Order;
    type Event = OrderEvent;

    fn fold(
        &self,
        state: Option<Order>,
        event: OrderEvent,
        envelope: &Event,
    ) -> Result<Option<Order>, FoldError> {
        let order = match (state, event) {
            (None, OrderEvent::OrderPlaced { total_cents: said, items, .. })
                if total_cents(&items) != Some(said) =>
            {
                return Err(FoldError::new("total is not what the items cost"));
            }
            (None, OrderEvent::OrderPlaced { customer_id, customer_name, currency, items, .. }) => {
                Order {
                    customer_id,
                    customer_name,
                    status: Status::Placed,
                    currency,
                    items,
                    placed_at_unix_us: envelope.committed_at.unix_micros(),
                }
            }
            (None, _) => return Err(FoldError::new("order is not placed")),
            (Some(order), event) => order.after(event)?,
        };
        match order.total_cents() {
            Some(_) => Ok(Some(order)),
            None => Err(FoldError::new("total leaves 64 bits")),
        }
    }
}
