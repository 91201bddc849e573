//! The worked example: orders of customers for products.
//!
//! [`domain`] is all that the services see. Money is in integer cents. An event carries the names and
//! prices as they were when its command ran, so that no read ever has to join.

mod customer;
mod history;
mod order;
mod order_command;
mod product;
mod rule;
mod totals;
mod upcast;
mod view;

use history::Histories;
use projection::{Domain, DomainBuilder, DomainError, Projection, SearchFields};
use totals::TotalsBy;

pub use customer::{Customer, CustomerEvent, Customers, RegisterCustomer, RenameCustomer};
pub use history::{HistoryEntry, OrderHistory};
pub use order::{Currency, Line, Order, OrderEvent, Orders, Status};
pub use order_command::{
    AddItem, CancelOrder, DeliverOrder, PlaceOrder, RemoveItem, RequestedItem, ShipOrder,
};
pub use product::{ChangePrice, CreateProduct, Product, ProductEvent, Products};
pub use rule::{
    ITEM_COUNT_MAX, NAME_BYTES_MAX, PRICE_CENTS_MAX, QUANTITY_MAX, REASON_BYTES_MAX,
    TOTAL_CENTS_MIN,
};
pub use view::{OrderDetail, OrderSummary, ProductHit};

const PRODUCT_SEARCH: SearchFields =
    SearchFields { words: &["name", "category"], number: "price_cents", label: "category" };

/// Aggregate types `order`, `customer` and `product`, their commands, the projection `orders` with
/// its views `order-detail`, `orders-by-customer` and `orders-by-status`, the rollups
/// `customer-summary`, `product-stats` and `sales-by-day`, the search view `product-search`, and
/// `order-history`, which is made when it is read.
pub fn domain() -> Result<Domain, DomainError> {
    let domain = Domain::builder()
        .aggregate("order", Orders)
        .aggregate("customer", Customers)
        .aggregate("product", Products)
        .command::<PlaceOrder>()
        .command::<AddItem>()
        .command::<RemoveItem>()
        .command::<ShipOrder>()
        .command::<DeliverOrder>()
        .command::<CancelOrder>()
        .command::<RegisterCustomer>()
        .command::<RenameCustomer>()
        .command::<CreateProduct>()
        .command::<ChangePrice>()
        .aggregate_schema::<Orders>("order")
        .aggregate_schema::<Customers>("customer")
        .aggregate_schema::<Products>("product")
        .view_schema::<OrderDetail>("order-detail")
        .view_schema::<OrderSummary>("orders-by-customer")
        .view_schema::<OrderSummary>("orders-by-status")
        .view_schema::<OrderHistory>("order-history")
        .view_schema::<ProductHit>("product-search")
        .upcaster("OrderPlaced", 1, upcast::order_placed_from_1)
        .upcaster("OrderPlaced", 2, upcast::order_placed_from_2)
        .projection(
            Projection::document("orders", 1, "order", Orders)
                .row("order-detail")
                .list("orders-by-customer")
                .list("orders-by-status")
                .partitions(8),
        )
        .projection(
            Projection::document("products", 1, "product", Products)
                .search("product-search", PRODUCT_SEARCH)
                .partitions(2),
        )
        .projection(
            Projection::document("order-history", 1, "order", Histories)
                .row("order-history")
                .on_demand(),
        );
    TotalsBy::projections().into_iter().fold(domain, DomainBuilder::projection).build()
}
