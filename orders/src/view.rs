//! What the projections `orders` and `products` show.

use projection::{Document, Rows};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Currency, Line, Order, Orders, Product, Products, Status};

/// A row of `order-detail`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct OrderDetail {
    /// Which.
    pub order_id: String,
    /// Who ordered.
    pub customer_id: String,
    /// The customer's name when the order was placed.
    pub customer_name: String,
    /// How far it is.
    pub status: Status,
    /// One line for each product.
    pub items: Vec<Line>,
    /// What its prices are in.
    pub currency: Currency,
    /// What it costs.
    pub total_cents: u64,
    /// When it was placed, in microseconds since 1970 by the log's clock.
    pub placed_at_unix_us: i64,
}

/// An item of `orders-by-customer` and of `orders-by-status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct OrderSummary {
    /// Which.
    pub order_id: String,
    /// Who ordered.
    pub customer_id: String,
    /// The customer's name when the order was placed.
    pub customer_name: String,
    /// How far it is.
    pub status: Status,
    /// How many products it is of.
    pub item_count: usize,
    /// What its prices are in.
    pub currency: Currency,
    /// What it costs.
    pub total_cents: u64,
    /// When it was placed, in microseconds since 1970 by the log's clock.
    pub placed_at_unix_us: i64,
}

/// A row of `product-search`, found by its name and category, its price and its category.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ProductHit {
    /// Which.
    pub product_id: String,
    /// What it is called.
    pub name: String,
    /// What one of it costs.
    pub price_cents: u64,
    /// What kind of thing it is.
    pub category: Option<String>,
}

impl Document for Products {
    fn rows(&self, product: &Product, rows: &mut Rows<'_>) {
        let hit = ProductHit {
            product_id: rows.aggregate().id().to_owned(),
            name: product.name.clone(),
            price_cents: product.price_cents,
            category: product.category.clone(),
        };
        rows.hit("product-search", &hit);
    }
}

impl Document for Orders {
    fn rows(&self, order: &Order, rows: &mut Rows<'_>) {
        let order_id = rows.aggregate().id().to_owned();
        // The fold refuses an order whose total has no value.
        let total_cents = order.total_cents().unwrap_or_default();
        let summary = OrderSummary {
            order_id: order_id.clone(),
            customer_id: order.customer_id.clone(),
            customer_name: order.customer_name.clone(),
            status: order.status,
            item_count: order.items.len(),
            currency: order.currency,
            total_cents,
            placed_at_unix_us: order.placed_at_unix_us,
        };
        rows.item("orders-by-customer", &order.customer_id, &summary);
        rows.item("orders-by-status", order.status.as_str(), &summary);
        rows.row(
            "order-detail",
            &OrderDetail {
                order_id,
                customer_id: order.customer_id.clone(),
                customer_name: order.customer_name.clone(),
                status: order.status,
                items: order.items.clone(),
                currency: order.currency,
                total_cents,
                placed_at_unix_us: order.placed_at_unix_us,
            },
        );
    }
}
