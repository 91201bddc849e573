//! The write side: an append-only log in Postgres that is its own outbox, and the relay that publishes it.
//!
//! [`EventStore::append`] checks an [`Append`] against the bounds, gathers it with others and commits
//! them in one call of one SQL function (or one plain statement, see `alone.sql`), so that positions are
//! dense and in commit order and the log's row lock never waits for a client. [`EventStore::append_once`] does the same under an idempotency key,
//! in the same call. [`Relay`] publishes the committed rows to the epoch's stream,
//! where stream sequence equals position; it keeps no cursor of its own.

mod alone;
mod append;
mod bounds;
mod call;
mod commit;
mod config;
mod each_alone;
mod epoch;
mod error;
mod gather;
mod idempotency;
mod lease;
mod log;
mod moment;
mod recent;
mod refusal;
mod relay;
mod seen;
mod snapshot;
mod store;

pub use append::{Append, Appended, Expected, NewEvent};
pub use config::{RelayConfig, StoreConfig, Timeouts};
pub use epoch::{Above, NewEpoch, NewEpochError, OpenedEpoch, list_epochs, open_epoch};
pub use error::{AppendError, InvalidAppend, OpenError, ReadError};
pub use idempotency::{AnswerFormat, FirstAnswer, Idempotency, Once, Repeat};
pub use log::{AggregateHead, Head};
pub use refusal::RefusalKind;
pub use relay::{CompareError, Relay, RelayState, RelayStatus, last_common};
pub use snapshot::{Keep, Tail};
pub use store::{Committer, EventStore, migrate};
