//! Customers.

use consistency::Event;
use projection::{Command, CommandError, Fold, FoldError, Found};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::rule::{self, ID_BYTES_MAX, ID_PATTERN, NAME_BYTES_MAX};

/// A registered customer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Customer {
    /// As last given.
    pub name: String,
}

/// What can happen to a customer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum CustomerEvent {
    /// The first event.
    CustomerRegistered {
        /// As given.
        name: String,
    },
    /// From now on; orders keep the name that they were placed under.
    CustomerRenamed {
        /// As given.
        name: String,
    },
}

/// The rules of aggregate type `customer`.
#[derive(Debug, Clone, Copy)]
pub struct Customers;

impl Fold for Customers {
    type State = Customer;
    type Event = CustomerEvent;

    fn fold(
        &self,
        state: Option<Customer>,
        event: CustomerEvent,
        _: &Event,
    ) -> Result<Option<Customer>, FoldError> {
        match (state, event) {
            (None, CustomerEvent::CustomerRegistered { name })
            | (Some(_), CustomerEvent::CustomerRenamed { name }) => Ok(Some(Customer { name })),
            (Some(_), CustomerEvent::CustomerRegistered { .. }) => {
                Err(FoldError::new("customer is registered already"))
            }
            (None, CustomerEvent::CustomerRenamed { .. }) => {
                Err(FoldError::new("customer is not registered"))
            }
        }
    }
}

/// Registers a new customer.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RegisterCustomer {
    /// The new customer's id.
    #[schemars(length(min = 1, max = ID_BYTES_MAX), regex(pattern = ID_PATTERN))]
    pub customer_id: String,
    /// The customer's name.
    #[schemars(length(min = 1, max = NAME_BYTES_MAX))]
    pub name: String,
}

impl Command for RegisterCustomer {
    const NAME: &'static str = "RegisterCustomer";
    const AGGREGATE_TYPE: &'static str = "customer";
    type Aggregate = Customers;

    fn aggregate_id(&self) -> &str {
        &self.customer_id
    }

    fn run(
        &self,
        state: Option<&Customer>,
        _: &Found<'_>,
    ) -> Result<Vec<CustomerEvent>, CommandError> {
        rule::is_new("customer-is-new", &self.customer_id, state)?;
        Ok(vec![CustomerEvent::CustomerRegistered { name: rule::name(&self.name)? }])
    }
}

/// Changes a customer's name.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RenameCustomer {
    /// Whose.
    #[schemars(length(min = 1, max = ID_BYTES_MAX), regex(pattern = ID_PATTERN))]
    pub customer_id: String,
    /// The new name.
    #[schemars(length(min = 1, max = NAME_BYTES_MAX))]
    pub name: String,
}

impl Command for RenameCustomer {
    const NAME: &'static str = "RenameCustomer";
    const AGGREGATE_TYPE: &'static str = "customer";
    type Aggregate = Customers;

    fn aggregate_id(&self) -> &str {
        &self.customer_id
    }

    fn run(
        &self,
        state: Option<&Customer>,
        _: &Found<'_>,
    ) -> Result<Vec<CustomerEvent>, CommandError> {
        rule::exists("customer-exists", &self.customer_id, state)?;
        Ok(vec![CustomerEvent::CustomerRenamed { name: rule::name(&self.name)? }])
    }
}
