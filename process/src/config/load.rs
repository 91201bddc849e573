//! Reads a configuration from its file and from the environment.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    path::{Path, PathBuf},
};

use serde_path_to_error::Segment;
use toml::{Table, Value};

use super::Config;

/// Why a process cannot start with its configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("configuration file {path} cannot be read")]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("configuration file {path} is not TOML: {detail}")]
    Syntax {
        /// Which file.
        path: PathBuf,
        /// Where and how.
        detail: String,
    },
    /// All that was found wrong, one a line.
    #[error("configuration is wrong:{}", bulleted(.0))]
    Mistakes(Vec<String>),
}

fn bulleted(mistakes: &[String]) -> String {
    mistakes.iter().fold(String::new(), |mut text, mistake| {
        write!(text, "\n  - {mistake}").expect("writing to a string cannot fail");
        text
    })
}

/// Reads the file at `path` and lays the variables `PREFIX__SECTION__KEY` of `environment` over it.
pub fn load<T: Config>(
    path: &Path,
    prefix: &str,
    environment: impl IntoIterator<Item = (String, String)>,
) -> Result<T, ConfigError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| ConfigError::Unreadable { path: path.to_owned(), source })?;
    let table = text.parse::<Table>().map_err(|error| ConfigError::Syntax {
        path: path.to_owned(),
        detail: error.message().to_owned(),
    })?;
    load_from(table, prefix, environment)
}

/// The same for a file that was read already.
pub fn load_from<T: Config>(
    mut table: Table,
    prefix: &str,
    environment: impl IntoIterator<Item = (String, String)>,
) -> Result<T, ConfigError> {
    let mut mistakes = BTreeSet::new();
    let mut overrides = lay_over(&mut table, prefix, environment, &mut mistakes);
    let mut unread = BTreeSet::new();
    let config = loop {
        match read_once::<T>(&table, &mut unread) {
            Ok(config) => break Some(config),
            Err(error) => {
                let path: Vec<String> = error.path().iter().map(segment_name).collect();
                // A variable is a text until its reader wants something else.
                if let Some(text) = overrides.remove(&path)
                    && let Some(value) = as_toml(&text)
                {
                    place(&mut table, &path, value);
                    continue;
                }
                mistakes.insert(described(&path, error.inner()));
                // What is wrong is taken out, so that the next reading finds the next mistake; when
                // nothing can be taken out any more, what is left cannot be judged.
                if path.is_empty() || !take_out(&mut table, &path) {
                    break None;
                }
            }
        }
    };
    mistakes.extend(unread.iter().map(|key| format!("{key}: nobody reads this key")));
    match config {
        Some(config) if mistakes.is_empty() => {
            let objections = config.mistakes();
            if objections.is_empty() { Ok(config) } else { Err(ConfigError::Mistakes(objections)) }
        }
        Some(_) | None => Err(ConfigError::Mistakes(mistakes.into_iter().collect())),
    }
}

fn read_once<T: Config>(
    table: &Table,
    unread: &mut BTreeSet<String>,
) -> Result<T, serde_path_to_error::Error<toml::de::Error>> {
    let mut note = |path: serde_ignored::Path<'_>| {
        unread.insert(path.to_string().replace('?', "").replace("..", "."));
    };
    let whole = Value::Table(table.clone());
    serde_path_to_error::deserialize(serde_ignored::Deserializer::new(whole, &mut note))
}

fn segment_name(segment: &Segment) -> String {
    match segment {
        Segment::Seq { index } => index.to_string(),
        Segment::Map { key } => key.clone(),
        Segment::Enum { variant } => variant.clone(),
        Segment::Unknown => "?".to_owned(),
    }
}

fn described(path: &[String], error: &toml::de::Error) -> String {
    let message = error.message().trim();
    if path.is_empty() { message.to_owned() } else { format!("{}: {message}", path.join(".")) }
}

/// Puts every variable in its place as a text, and says what was put where.
fn lay_over(
    table: &mut Table,
    prefix: &str,
    environment: impl IntoIterator<Item = (String, String)>,
    mistakes: &mut BTreeSet<String>,
) -> BTreeMap<Vec<String>, String> {
    let mut overrides = BTreeMap::new();
    for (name, text) in environment {
        let Some(rest) = name.strip_prefix(prefix).and_then(|rest| rest.strip_prefix("__")) else {
            continue;
        };
        let path: Vec<String> = rest.split("__").map(str::to_ascii_lowercase).collect();
        let path = as_written(table, path);
        if place(table, &path, Value::String(text.clone())) {
            overrides.insert(path, text);
        } else {
            mistakes.insert(format!("{name}: names no place in the configuration"));
        }
    }
    overrides
}

/// A variable cannot hold a `-`, so `_` stands for it where the file already has such a key.
fn as_written(table: &Table, mut path: Vec<String>) -> Vec<String> {
    let mut here = Some(table);
    for part in &mut path {
        if let Some(table) = here {
            let written = table.keys().find(|key| key.to_lowercase().replace('-', "_") == *part);
            if let Some(written) = written {
                part.clone_from(written);
            }
            here = table.get(part).and_then(Value::as_table);
        }
    }
    path
}

fn place(table: &mut Table, path: &[String], value: Value) -> bool {
    let Some((first, rest)) = path.split_first() else { return false };
    let Some((last, parents)) = rest.split_last() else {
        table.insert(first.clone(), value);
        return true;
    };
    let mut here = table.entry(first.clone()).or_insert_with(|| Value::Table(Table::new()));
    for part in parents {
        if let Value::Table(table) = here {
            table.entry(part.clone()).or_insert_with(|| Value::Table(Table::new()));
        }
        let Some(next) = member(here, part) else { return false };
        here = next;
    }
    if let Value::Table(table) = here {
        table.insert(last.clone(), value);
        return true;
    }
    false
}

fn take_out(table: &mut Table, path: &[String]) -> bool {
    let Some((first, rest)) = path.split_first() else { return false };
    let Some((last, parents)) = rest.split_last() else { return table.remove(first).is_some() };
    let here = table.get_mut(first);
    let here = parents.iter().fold(here, |here, part| here.and_then(|here| member(here, part)));
    if let Some(Value::Array(items)) = here {
        let at = last.parse::<usize>().ok().filter(|at| *at < items.len());
        return at.map(|at| items.remove(at)).is_some();
    }
    here.and_then(Value::as_table_mut).and_then(|table| table.remove(last)).is_some()
}

fn member<'a>(here: &'a mut Value, part: &str) -> Option<&'a mut Value> {
    if let Value::Array(items) = here {
        return part.parse::<usize>().ok().and_then(|at| items.get_mut(at));
    }
    here.as_table_mut()?.get_mut(part)
}

/// The value that `text` stands for when it is no text: a number, a boolean, an array, a table.
fn as_toml(text: &str) -> Option<Value> {
    let mut table = format!("value = {text}").parse::<Table>().ok()?;
    table.remove("value")
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;
    use crate::config::{Period, Secret};

    #[derive(Debug, Deserialize)]
    struct Example {
        region: String,
        #[serde(default)]
        listen: Listen,
        #[serde(default)]
        views: BTreeMap<String, View>,
    }

    #[derive(Debug, Default, Deserialize)]
    struct Listen {
        #[serde(default)]
        port: u16,
        wait_max: Option<Period>,
        password: Option<Secret>,
    }

    #[derive(Debug, Deserialize)]
    struct View {
        #[serde(default)]
        policy: String,
    }

    impl Config for Example {
        fn mistakes(&self) -> Vec<String> {
            let nameless = self.region.is_empty();
            nameless.then(|| "region: must not be empty".to_owned()).into_iter().collect()
        }
    }

    fn read(text: &str, environment: &[(&str, &str)]) -> Result<Example, ConfigError> {
        let environment = environment.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        load_from(text.parse().unwrap(), "GATEWAY", environment)
    }

    fn mistakes(text: &str, environment: &[(&str, &str)]) -> Vec<String> {
        match read(text, environment) {
            Err(ConfigError::Mistakes(mistakes)) => mistakes,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_environment_wins_over_the_file_and_takes_the_kind_that_is_wanted() {
        let example = read(
            "region = \"eu-west\"\nlisten = { port = 1 }\nviews.order-detail.policy = \"wait\"",
            &[
                ("GATEWAY__LISTEN__PORT", "8080"),
                ("GATEWAY__LISTEN__WAIT_MAX", "250ms"),
                ("GATEWAY__LISTEN__PASSWORD", "12345"),
                ("GATEWAY__VIEWS__ORDER_DETAIL__POLICY", "forward"),
                ("GATEWAY_CONFIG", "not ours"),
                ("PATH", "/bin"),
            ],
        )
        .unwrap();
        assert_eq!(example.listen.port, 8080);
        assert_eq!(example.listen.wait_max, Some(Period::from_millis(250)));
        assert_eq!(example.listen.password.unwrap().expose(), "12345");
        assert_eq!(example.views["order-detail"].policy, "forward");
    }

    #[test]
    fn all_mistakes_are_reported_together() {
        let found = mistakes(
            "region = \"eu\"\ncolour = 1\n[listen]\nport = \"x\"\nwait_max = \"5\"\nprot = 2",
            &[("GATEWAY__LISTEN__PORTS", "1")],
        );
        let text = found.join("\n");
        for named in ["colour", "listen.port", "listen.wait_max", "listen.prot", "listen.ports"] {
            assert!(text.lines().any(|line| line.starts_with(&format!("{named}:"))), "{text}");
        }
        assert_eq!(found.len(), 5, "{text}");
    }

    #[test]
    fn a_missing_key_is_named() {
        assert!(mistakes("[listen]\nport = 1", &[])[0].contains("region"));
    }

    #[test]
    fn what_the_process_objects_to_is_a_mistake_as_well() {
        assert_eq!(mistakes("region = \"\"", &[]), ["region: must not be empty"]);
    }
}
