//! Products.

use consistency::Event;
use projection::{Command, CommandError, Fold, FoldError, Found};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::rule::{self, ID_BYTES_MAX, ID_PATTERN, NAME_BYTES_MAX, PRICE_CENTS_MAX};

/// A product that can be ordered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Product {
    /// What it is called.
    pub name: String,
    /// What one of it costs.
    pub price_cents: u64,
    /// What kind of thing it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub category: Option<String>,
}

/// What can happen to a product.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ProductEvent {
    /// The first event.
    ProductCreated {
        /// What it is called.
        name: String,
        /// What one of it costs.
        price_cents: u64,
        /// What kind of thing it is.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        category: Option<String>,
    },
    /// From now on; orders keep the price that an item was added at.
    PriceChanged {
        /// What one of it costs.
        price_cents: u64,
    },
}

/// The rules of aggregate type `product`.
#[derive(Debug, Clone, Copy)]
pub struct Products;

impl Fold for Products {
    type State = Product;
    type Event = ProductEvent;

    fn fold(
        &self,
        state: Option<Product>,
        event: ProductEvent,
        _: &Event,
    ) -> Result<Option<Product>, FoldError> {
        match (state, event) {
            (None, ProductEvent::ProductCreated { name, price_cents, category }) => {
                Ok(Some(Product { name, price_cents, category }))
            }
            (Some(product), ProductEvent::PriceChanged { price_cents }) => {
                Ok(Some(Product { price_cents, ..product }))
            }
            (Some(_), ProductEvent::ProductCreated { .. }) => {
                Err(FoldError::new("product is created already"))
            }
            (None, ProductEvent::PriceChanged { .. }) => {
                Err(FoldError::new("product is not created"))
            }
        }
    }
}

/// Creates a new product.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateProduct {
    /// The new product's id.
    #[schemars(length(min = 1, max = ID_BYTES_MAX), regex(pattern = ID_PATTERN))]
    pub product_id: String,
    /// What it is called.
    #[schemars(length(min = 1, max = NAME_BYTES_MAX))]
    pub name: String,
    /// What one of it costs.
    #[schemars(range(min = 1, max = PRICE_CENTS_MAX))]
    pub price_cents: i64,
    /// What kind of thing it is, to be found by.
    #[serde(default)]
    pub category: Option<String>,
}

impl Command for CreateProduct {
    const NAME: &'static str = "CreateProduct";
    const AGGREGATE_TYPE: &'static str = "product";
    type Aggregate = Products;

    fn aggregate_id(&self) -> &str {
        &self.product_id
    }

    fn run(
        &self,
        state: Option<&Product>,
        _: &Found<'_>,
    ) -> Result<Vec<ProductEvent>, CommandError> {
        rule::is_new("product-is-new", &self.product_id, state)?;
        let (name, price_cents) = (rule::name(&self.name)?, rule::price(self.price_cents)?);
        let category = self.category.as_deref().map(rule::name).transpose()?;
        Ok(vec![ProductEvent::ProductCreated { name, price_cents, category }])
    }
}

/// Changes a product's price.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ChangePrice {
    /// Which.
    #[schemars(length(min = 1, max = ID_BYTES_MAX), regex(pattern = ID_PATTERN))]
    pub product_id: String,
    /// What one of it costs from now on.
    #[schemars(range(min = 1, max = PRICE_CENTS_MAX))]
    pub price_cents: i64,
}

impl Command for ChangePrice {
    const NAME: &'static str = "ChangePrice";
    const AGGREGATE_TYPE: &'static str = "product";
    type Aggregate = Products;

    fn aggregate_id(&self) -> &str {
        &self.product_id
    }

    fn run(
        &self,
        state: Option<&Product>,
        _: &Found<'_>,
    ) -> Result<Vec<ProductEvent>, CommandError> {
        rule::exists("product-exists", &self.product_id, state)?;
        Ok(vec![ProductEvent::PriceChanged { price_cents: rule::price(self.price_cents)? }])
    }
}
