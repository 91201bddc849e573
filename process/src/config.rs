//! One TOML file a process, every key of it overridable from the environment.
//!
//! A mistake in the configuration ends the start with [`EXIT_CODE`], and all mistakes that can be
//! found are reported together: keys that nobody reads, values of the wrong kind, and what the
//! process itself has to object.

mod load;
mod value;

pub use load::{ConfigError, load, load_from};
pub use value::{Period, Secret, SecretUrl};

/// What a process exits with when its configuration is wrong (`EX_USAGE` of sysexits).
pub const EXIT_CODE: u8 = 64;

/// A configuration that can say what is wrong with it beyond the kinds of its values.
pub trait Config: serde::de::DeserializeOwned {
    /// Every mistake, each a sentence that names its key. Empty when there is none.
    fn mistakes(&self) -> Vec<String>;
}
