//! What orders come to by customer, by product and by day.

use consistency::Event;
use jiff::Timestamp;
use jiff::tz::Offset;
use projection::{Deltas, Fold, FoldError, Projection, Summary};

use crate::{Order, OrderEvent, Orders, Status};

/// Sums over orders. A cancelled order is in none of them any more.
#[derive(Debug, Clone, Copy)]
pub(crate) enum TotalsBy {
    Customer,
    Product,
    Day,
}

impl TotalsBy {
    /// The projections `totals-by-customer`, `totals-by-product` and `totals-by-day`.
    pub(crate) fn projections() -> [Projection; 3] {
        let summary = |name, view, totals| Projection::summary(name, 1, "order", view, totals);
        [
            summary("totals-by-customer", "customer-summary", Self::Customer)
                .sum("order_count")
                .sum("total_spent_cents")
                .max("last_order_placed_at_unix_us"),
            summary("totals-by-product", "product-stats", Self::Product)
                .sum("order_count")
                .sum("quantity")
                .sum("revenue_cents"),
            summary("totals-by-day", "sales-by-day", Self::Day)
                .sum("order_count")
                .sum("revenue_cents"),
        ]
        // Every row depends on all partitions, and the work is small.
        .map(|projection| projection.partitions(2))
    }
}

impl Fold for TotalsBy {
    type State = Order;
    type Event = OrderEvent;

    fn fold(
        &self,
        state: Option<Order>,
        event: OrderEvent,
        envelope: &Event,
    ) -> Result<Option<Order>, FoldError> {
        let order = Orders.fold(state, event, envelope)?;
        match &order {
            Some(order) if i64::try_from(order.total_cents().unwrap_or(u64::MAX)).is_err() => {
                Err(FoldError::new("total leaves a signed 64 bits"))
            }
            Some(_) | None => Ok(order),
        }
    }
}

impl Summary for TotalsBy {
    fn deltas(&self, order: &Order, deltas: &mut Deltas<'_>) {
        let counts = match order.status {
            Status::Placed | Status::Shipped | Status::Delivered => true,
            Status::Cancelled => false,
        };
        match self {
            Self::Customer => by_customer(order, counts, deltas),
            Self::Product => by_product(order, counts, deltas),
            Self::Day => by_day(order, counts, deltas),
        }
    }
}

/// The last order counts as placed, whatever became of it.
fn by_customer(order: &Order, counts: bool, deltas: &mut Deltas<'_>) {
    let customer = order.customer_id.as_str();
    deltas.add(customer, "last_order_placed_at_unix_us", order.placed_at_unix_us);
    deltas.add(customer, "order_count", i64::from(counts));
    deltas.add(customer, "total_spent_cents", if counts { total(order) } else { 0 });
}

fn by_product(order: &Order, counts: bool, deltas: &mut Deltas<'_>) {
    for line in order.items.iter().filter(|_| counts) {
        let product = line.product_id.as_str();
        deltas.add(product, "order_count", 1);
        deltas.add(product, "quantity", i64::from(line.quantity));
        deltas.add(product, "revenue_cents", cents(line.total_cents()));
    }
}

fn by_day(order: &Order, counts: bool, deltas: &mut Deltas<'_>) {
    if counts {
        let day = day(order.placed_at_unix_us);
        deltas.add(day.as_str(), "order_count", 1);
        deltas.add(day, "revenue_cents", total(order));
    }
}

fn total(order: &Order) -> i64 {
    cents(order.total_cents())
}

/// The fold lets no total in that this would change.
fn cents(amount: Option<u64>) -> i64 {
    amount.and_then(|cents| i64::try_from(cents).ok()).unwrap_or(i64::MAX)
}

/// The day in UTC, as in `2026-01-31`. What no calendar holds counts as its nearest day.
fn day(unix_us: i64) -> String {
    let nearest = if unix_us < 0 { Timestamp::MIN } else { Timestamp::MAX };
    let at = Timestamp::from_microsecond(unix_us).unwrap_or(nearest);
    Offset::UTC.to_datetime(at).date().to_string()
}
