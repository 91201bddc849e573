//! Rules that several commands share. Their names are part of the API.

use projection::CommandError;

/// Most products in one order.
pub const ITEM_COUNT_MAX: usize = 100;
/// Most of one product in one order.
pub const QUANTITY_MAX: u32 = 10_000;
/// Highest price of a product: a million.
pub const PRICE_CENTS_MAX: u64 = 100_000_000;
/// Lowest total of an order: 10.00.
pub const TOTAL_CENTS_MIN: u64 = 1_000;
/// Longest name of a customer or a product, in bytes.
pub const NAME_BYTES_MAX: usize = 200;
/// Longest reason of a cancellation, in bytes.
pub const REASON_BYTES_MAX: usize = 500;

/// Longest id of an order, a customer or a product, in bytes.
pub(crate) const ID_BYTES_MAX: usize = consistency::AGGREGATE_ID_BYTES_MAX;
/// Visible ASCII without a slash.
pub(crate) const ID_PATTERN: &str = "^[!-.0-~]+$";

/// A quantity from 1 to [`QUANTITY_MAX`].
pub(crate) fn quantity(asked: i64) -> Result<u32, CommandError> {
    if asked <= 0 {
        return Err(CommandError::rule("quantity-above-zero", format!("quantity is {asked}")));
    }
    let within = u32::try_from(asked).ok().filter(|quantity| *quantity <= QUANTITY_MAX);
    within.ok_or_else(|| {
        let detail = format!("quantity is {asked}, at most {QUANTITY_MAX} are allowed");
        CommandError::rule("quantity-maximum", detail)
    })
}

/// A price from 1 to [`PRICE_CENTS_MAX`].
pub(crate) fn price(cents: i64) -> Result<u64, CommandError> {
    let within = u64::try_from(cents).ok().filter(|cents| (1..=PRICE_CENTS_MAX).contains(cents));
    within.ok_or_else(|| {
        let detail = format!("price is {cents} cents, 1 to {PRICE_CENTS_MAX} are allowed");
        CommandError::rule("price-bounds", detail)
    })
}

/// A name that is not blank, has no control characters and at most [`NAME_BYTES_MAX`] bytes.
pub(crate) fn name(text: &str) -> Result<String, CommandError> {
    if text.trim().is_empty() || text.len() > NAME_BYTES_MAX || text.chars().any(char::is_control) {
        let detail = format!("a name has 1 to {NAME_BYTES_MAX} bytes and no control characters");
        return Err(CommandError::rule("name-bounds", detail));
    }
    Ok(text.to_owned())
}

/// Refuses to make what is there already.
pub(crate) fn is_new<S>(
    rule: &'static str,
    id: &str,
    state: Option<&S>,
) -> Result<(), CommandError> {
    match state {
        None => Ok(()),
        Some(_) => Err(CommandError::rule(rule, format!("{id} exists already"))),
    }
}

/// Refuses to change, or to refer to, what is not there.
pub(crate) fn exists<'s, S>(
    rule: &'static str,
    id: &str,
    state: Option<&'s S>,
) -> Result<&'s S, CommandError> {
    state.ok_or_else(|| CommandError::rule(rule, format!("{id} does not exist")))
}
