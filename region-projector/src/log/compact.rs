//! The compact form of the log: an object names the headers of the events that follow, each array is one
//! event, the values of those headers and its data last.

use consistency::Event;
use serde::Deserialize;

use super::LogError;

/// What it is asked for by.
pub(super) const MEDIA_TYPE: &str = "application/vnd.tidemark.log";

#[derive(Deserialize)]
struct Names {
    headers: Vec<String>,
}

/// The events of all lines.
pub(super) fn events<'a>(lines: impl Iterator<Item = &'a [u8]>) -> Result<Vec<Event>, LogError> {
    let mut names: Vec<String> = Vec::new();
    let mut events = Vec::new();
    for line in lines {
        if line.starts_with(b"{") {
            names = serde_json::from_slice::<Names>(line)?.headers;
        } else {
            events.push(event(&names, line)?);
        }
    }
    Ok(events)
}

fn event(names: &[String], line: &[u8]) -> Result<Event, LogError> {
    let mut values: Vec<String> = serde_json::from_slice(line)?;
    let data = values.pop().unwrap_or_default();
    let find = |name: &'static str| {
        let found = names.iter().zip(&values).find(|(known, _)| *known == name);
        found.map(|(_, value)| value.as_str())
    };
    Ok(Event::from_message(find, data.into_bytes())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(lines: &[&str]) -> Result<Vec<Event>, LogError> {
        events(lines.iter().map(|line| line.as_bytes()))
    }

    #[test]
    fn lines_that_are_no_events_are_errors() {
        assert!(read(&[]).unwrap().is_empty());
        assert!(read(&[r#"{"headers":[]}"#]).unwrap().is_empty());
        assert!(matches!(read(&["[1]"]), Err(LogError::Malformed(_))));
        assert!(matches!(read(&["[]"]), Err(LogError::Event(_))));
        assert!(matches!(
            read(&[r#"{"headers":["a"]}"#, r#"["b","{}"]"#]),
            Err(LogError::Event(_))
        ));
    }
}
