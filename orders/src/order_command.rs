//! Commands on orders, and the rules that they keep.

use projection::{Command, CommandError, Found};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::order::total_cents;
use crate::rule::{
    self, ID_BYTES_MAX, ID_PATTERN, ITEM_COUNT_MAX, QUANTITY_MAX, REASON_BYTES_MAX, TOTAL_CENTS_MIN,
};
use crate::{Currency, Customer, Line, Order, OrderEvent, Orders, Product, Status};

/// Places a new order.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PlaceOrder {
    /// The new order's id.
    #[schemars(length(min = 1, max = ID_BYTES_MAX), regex(pattern = ID_PATTERN))]
    pub order_id: String,
    /// Who orders.
    #[schemars(length(min = 1, max = ID_BYTES_MAX), regex(pattern = ID_PATTERN))]
    pub customer_id: String,
    /// What; the same product twice counts together.
    #[schemars(length(min = 1, max = ITEM_COUNT_MAX))]
    pub items: Vec<RequestedItem>,
}

/// A product and how many of it.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RequestedItem {
    /// Which.
    #[schemars(length(min = 1, max = ID_BYTES_MAX), regex(pattern = ID_PATTERN))]
    pub product_id: String,
    /// How many; checked by a rule, so that a caller who asks for none is told its name.
    #[schemars(range(min = 1, max = QUANTITY_MAX))]
    pub quantity: i64,
}

impl Command for PlaceOrder {
    const NAME: &'static str = "PlaceOrder";
    const AGGREGATE_TYPE: &'static str = "order";
    type Aggregate = Orders;

    fn aggregate_id(&self) -> &str {
        &self.order_id
    }

    fn lookups(&self) -> Vec<(&'static str, &str)> {
        // What comes after the bound is refused by its rule and need not be looked up.
        let items = self.items.iter().take(ITEM_COUNT_MAX);
        let products = items.map(|item| ("product", item.product_id.as_str()));
        std::iter::once(("customer", self.customer_id.as_str())).chain(products).collect()
    }

    fn run(
        &self,
        state: Option<&Order>,
        found: &Found<'_>,
    ) -> Result<Vec<OrderEvent>, CommandError> {
        rule::is_new("order-is-new", &self.order_id, state)?;
        if self.items.is_empty() {
            return Err(CommandError::rule("order-has-items", "an order has at least one item"));
        }
        check_item_count(self.items.len())?;
        let customer = found.state::<Customer>("customer", &self.customer_id);
        let customer = rule::exists("customer-exists", &self.customer_id, customer)?;
        let mut items = Vec::new();
        for item in &self.items {
            let line = line(&items, &item.product_id, item.quantity, found)?;
            items = with_line(items, line)?;
        }
        let total_cents = check_total(&items)?;
        Ok(vec![OrderEvent::OrderPlaced {
            customer_id: self.customer_id.clone(),
            customer_name: customer.name.clone(),
            currency: Currency::default(),
            total_cents,
            items,
        }])
    }
}

/// Adds a product to a placed order, or more of one that is in it, at the price it has there.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AddItem {
    /// Which order.
    #[schemars(length(min = 1, max = ID_BYTES_MAX), regex(pattern = ID_PATTERN))]
    pub order_id: String,
    /// Which product.
    #[schemars(length(min = 1, max = ID_BYTES_MAX), regex(pattern = ID_PATTERN))]
    pub product_id: String,
    /// How many more.
    #[schemars(range(min = 1, max = QUANTITY_MAX))]
    pub quantity: i64,
}

impl Command for AddItem {
    const NAME: &'static str = "AddItem";
    const AGGREGATE_TYPE: &'static str = "order";
    type Aggregate = Orders;

    fn aggregate_id(&self) -> &str {
        &self.order_id
    }

    fn lookups(&self) -> Vec<(&'static str, &str)> {
        vec![("product", &self.product_id)]
    }

    fn run(
        &self,
        state: Option<&Order>,
        found: &Found<'_>,
    ) -> Result<Vec<OrderEvent>, CommandError> {
        let order = placed(&self.order_id, state)?;
        let line = line(&order.items, &self.product_id, self.quantity, found)?;
        let items = with_line(order.items.clone(), line.clone())?;
        check_item_count(items.len())?;
        check_total(&items)?;
        Ok(vec![OrderEvent::ItemAdded(line)])
    }
}

/// Takes some of a product out of a placed order.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RemoveItem {
    /// Which order.
    #[schemars(length(min = 1, max = ID_BYTES_MAX), regex(pattern = ID_PATTERN))]
    pub order_id: String,
    /// Which product.
    #[schemars(length(min = 1, max = ID_BYTES_MAX), regex(pattern = ID_PATTERN))]
    pub product_id: String,
    /// How many less.
    #[schemars(range(min = 1, max = QUANTITY_MAX))]
    pub quantity: i64,
}

impl Command for RemoveItem {
    const NAME: &'static str = "RemoveItem";
    const AGGREGATE_TYPE: &'static str = "order";
    type Aggregate = Orders;

    fn aggregate_id(&self) -> &str {
        &self.order_id
    }

    fn run(&self, state: Option<&Order>, _: &Found<'_>) -> Result<Vec<OrderEvent>, CommandError> {
        let order = placed(&self.order_id, state)?;
        let quantity = rule::quantity(self.quantity)?;
        let held = order.line(&self.product_id).map_or(0, |line| line.quantity);
        if held < quantity {
            let detail = format!("the order has {held} of {}", self.product_id);
            return Err(CommandError::rule("item-in-order", detail));
        }
        let mut items = order.items.clone();
        for line in items.iter_mut().filter(|line| line.product_id == self.product_id) {
            line.quantity -= quantity;
        }
        items.retain(|line| line.quantity > 0);
        if items.is_empty() {
            return Err(CommandError::rule("order-has-items", "it is the last item of the order"));
        }
        check_total(&items)?;
        Ok(vec![OrderEvent::ItemRemoved { product_id: self.product_id.clone(), quantity }])
    }
}

/// Ships a placed order.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ShipOrder {
    /// Which.
    #[schemars(length(min = 1, max = ID_BYTES_MAX), regex(pattern = ID_PATTERN))]
    pub order_id: String,
}

impl Command for ShipOrder {
    const NAME: &'static str = "ShipOrder";
    const AGGREGATE_TYPE: &'static str = "order";
    type Aggregate = Orders;

    fn aggregate_id(&self) -> &str {
        &self.order_id
    }

    fn run(&self, state: Option<&Order>, _: &Found<'_>) -> Result<Vec<OrderEvent>, CommandError> {
        placed(&self.order_id, state)?;
        Ok(vec![OrderEvent::OrderShipped {}])
    }
}

/// Records that a shipped order arrived.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DeliverOrder {
    /// Which.
    #[schemars(length(min = 1, max = ID_BYTES_MAX), regex(pattern = ID_PATTERN))]
    pub order_id: String,
}

impl Command for DeliverOrder {
    const NAME: &'static str = "DeliverOrder";
    const AGGREGATE_TYPE: &'static str = "order";
    type Aggregate = Orders;

    fn aggregate_id(&self) -> &str {
        &self.order_id
    }

    fn run(&self, state: Option<&Order>, _: &Found<'_>) -> Result<Vec<OrderEvent>, CommandError> {
        let order = rule::exists("order-exists", &self.order_id, state)?;
        match order.status {
            Status::Shipped => Ok(vec![OrderEvent::OrderDelivered {}]),
            Status::Placed | Status::Delivered | Status::Cancelled => {
                Err(CommandError::rule("order-is-shipped", is(order.status)))
            }
        }
    }
}

/// Calls a placed order off.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CancelOrder {
    /// Which.
    #[schemars(length(min = 1, max = ID_BYTES_MAX), regex(pattern = ID_PATTERN))]
    pub order_id: String,
    /// Why, in the customer's words.
    #[serde(default)]
    #[schemars(length(max = REASON_BYTES_MAX))]
    pub reason: Option<String>,
}

impl Command for CancelOrder {
    const NAME: &'static str = "CancelOrder";
    const AGGREGATE_TYPE: &'static str = "order";
    type Aggregate = Orders;

    fn aggregate_id(&self) -> &str {
        &self.order_id
    }

    fn run(&self, state: Option<&Order>, _: &Found<'_>) -> Result<Vec<OrderEvent>, CommandError> {
        let order = rule::exists("order-exists", &self.order_id, state)?;
        match order.status {
            Status::Placed => {}
            Status::Shipped | Status::Delivered => {
                let rule = "shipped-order-cannot-be-cancelled";
                return Err(CommandError::rule(rule, is(order.status)));
            }
            Status::Cancelled => {
                return Err(CommandError::rule("order-is-placed", is(order.status)));
            }
        }
        let reason_bytes = self.reason.as_ref().map_or(0, String::len);
        if reason_bytes > REASON_BYTES_MAX {
            let detail = format!("reason has {reason_bytes} bytes, at most {REASON_BYTES_MAX}");
            return Err(CommandError::rule("reason-bounds", detail));
        }
        Ok(vec![OrderEvent::OrderCancelled { reason: self.reason.clone() }])
    }
}

fn placed<'s>(order_id: &str, state: Option<&'s Order>) -> Result<&'s Order, CommandError> {
    let order = rule::exists("order-exists", order_id, state)?;
    match order.status {
        Status::Placed => Ok(order),
        Status::Shipped | Status::Delivered | Status::Cancelled => {
            Err(CommandError::rule("order-is-placed", is(order.status)))
        }
    }
}

fn is(status: Status) -> String {
    format!("the order is {}", status.as_str())
}

/// So many of a product: at the name and price it has in `items`, else as it is found.
fn line(
    items: &[Line],
    product_id: &str,
    quantity: i64,
    found: &Found<'_>,
) -> Result<Line, CommandError> {
    let quantity = rule::quantity(quantity)?;
    if let Some(held) = items.iter().find(|held| held.product_id == product_id) {
        return Ok(Line { quantity, ..held.clone() });
    }
    let product = found.state::<Product>("product", product_id);
    let product = rule::exists("product-exists", product_id, product)?;
    Ok(Line {
        product_id: product_id.to_owned(),
        product_name: product.name.clone(),
        unit_price_cents: product.price_cents,
        quantity,
    })
}

/// `items` and `line`, as one line when the product is in them already.
fn with_line(mut items: Vec<Line>, line: Line) -> Result<Vec<Line>, CommandError> {
    match items.iter_mut().find(|held| held.product_id == line.product_id) {
        Some(held) => {
            held.quantity = rule::quantity(i64::from(held.quantity) + i64::from(line.quantity))?;
        }
        None => items.push(line),
    }
    Ok(items)
}

fn check_item_count(count: usize) -> Result<(), CommandError> {
    if count <= ITEM_COUNT_MAX {
        return Ok(());
    }
    let detail = format!("{count} items, at most {ITEM_COUNT_MAX} are allowed");
    Err(CommandError::rule("item-count-maximum", detail))
}

/// What the items cost together, when that is within its bounds.
fn check_total(items: &[Line]) -> Result<u64, CommandError> {
    match total_cents(items) {
        None => Err(CommandError::rule("order-total-maximum", "the total is too large")),
        Some(total) if total < TOTAL_CENTS_MIN => {
            let detail = format!("the total is {total} cents, {TOTAL_CENTS_MIN} is the least");
            Err(CommandError::rule("order-total-minimum", detail))
        }
        Some(total) => Ok(total),
    }
}
