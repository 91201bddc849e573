//! What brings events of older schemas to the newest one.
//!
//! `OrderPlaced` has had three. The first had customer and items; there was one currency, and nobody
//! said which. The second names it. The third states the total, as it was shown to the customer.

use projection::FoldError;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::order::total_cents;
use crate::{Currency, Line};

/// Names the currency that all prices were in.
pub(crate) fn order_placed_from_1(data: Value) -> Result<Value, FoldError> {
    let mut fields = fields(data)?;
    fields.insert("currency".to_owned(), json!(Currency::Eur));
    Ok(Value::Object(fields))
}

/// States the total.
pub(crate) fn order_placed_from_2(data: Value) -> Result<Value, FoldError> {
    let mut fields = fields(data)?;
    let items = fields.get("items").ok_or_else(|| FoldError::new("there are no items"))?;
    let items =
        Vec::<Line>::deserialize(items).map_err(|error| FoldError::new(error.to_string()))?;
    let total = total_cents(&items).ok_or_else(|| FoldError::new("total leaves 64 bits"))?;
    fields.insert("total_cents".to_owned(), json!(total));
    Ok(Value::Object(fields))
}

fn fields(data: Value) -> Result<Map<String, Value>, FoldError> {
    match data {
        Value::Object(fields) => Ok(fields),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
            Err(FoldError::new("data are not an object"))
        }
    }
}
