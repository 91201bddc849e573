//! What was measured: a Markdown table for people, JSON for programs.

use std::fmt::{self, Display, Formatter};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::Serialize;

/// What a row has to come to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Goal {
    /// Ours is at least so many times the baseline.
    RatioMin(f64),
    /// Ours is at most so many times the baseline.
    RatioMax(f64),
    /// Ours is at most that, in the row's unit.
    ValueMax(f64),
}

impl Goal {
    fn is_met(self, value: f64, ratio: Option<f64>) -> bool {
        match self {
            Self::RatioMin(bound) => ratio.is_some_and(|ratio| bound <= ratio),
            Self::RatioMax(bound) => ratio.is_some_and(|ratio| ratio <= bound),
            Self::ValueMax(bound) => value <= bound,
        }
    }
}

impl Display for Goal {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::RatioMin(bound) => write!(f, ">= {bound} x"),
            Self::RatioMax(bound) => write!(f, "<= {bound} x"),
            Self::ValueMax(bound) => write!(f, "<= {bound}"),
        }
    }
}

/// One row.
#[derive(Debug, Serialize)]
pub struct Line {
    name: &'static str,
    unit: &'static str,
    /// Median of `samples`.
    value: f64,
    /// Median of `baseline_samples`; absent where nothing is compared.
    baseline: Option<f64>,
    /// `value / baseline`.
    ratio: Option<f64>,
    samples: Vec<f64>,
    baseline_samples: Vec<f64>,
    goal: String,
    met: bool,
    /// What else a reader should know.
    #[serde(skip_serializing_if = "Option::is_none")]
    note: Option<String>,
}

impl Line {
    /// Of samples and what they are compared with, which may be nothing.
    pub fn new(
        name: &'static str,
        unit: &'static str,
        samples: Vec<f64>,
        baseline_samples: Vec<f64>,
        goal: Goal,
    ) -> Self {
        let value = median(&samples).unwrap_or(f64::NAN);
        let baseline = median(&baseline_samples);
        let ratio = baseline.map(|baseline| value / baseline);
        let met = goal.is_met(value, ratio);
        let goal = goal.to_string();
        Self {
            name,
            unit,
            value,
            baseline,
            ratio,
            samples,
            baseline_samples,
            goal,
            met,
            note: None,
        }
    }

    /// Adds what else a reader should know.
    #[must_use]
    pub fn noting(mut self, note: impl Into<String>) -> Self {
        self.note = Some(note.into());
        self
    }
}

/// All rows that were measured.
#[derive(Debug, Default)]
pub struct Report {
    lines: Vec<Line>,
}

impl Report {
    /// Adds rows.
    pub fn add(&mut self, lines: Vec<Line>) {
        self.lines.extend(lines);
    }

    /// Names of the rows that are not what they have to be.
    pub fn missed(&self) -> Vec<&'static str> {
        self.lines.iter().filter(|line| !line.met).map(|line| line.name).collect()
    }

    /// Writes it as JSON: a list of rows.
    pub fn write(&self, file: &Path) -> anyhow::Result<()> {
        if let Some(folder) = file.parent() {
            std::fs::create_dir_all(folder)?;
        }
        std::fs::write(file, serde_json::to_string_pretty(&self.lines)?)
            .with_context(|| format!("could not write {}", file.display()))
    }
}

/// Where the report goes unless somebody says otherwise.
pub fn default_file() -> PathBuf {
    compose::tools::repository().join("target").join("bench").join("report.json")
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "| name | ours | baseline | unit | ratio | goal | met |")?;
        writeln!(f, "|---|---:|---:|---|---:|---|---|")?;
        for line in &self.lines {
            let Line { name, unit, value, baseline, ratio, goal, met, .. } = line;
            let baseline = baseline.map_or_else(|| "-".to_owned(), rounded);
            let ratio = ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"));
            let (value, met) = (rounded(*value), if *met { "yes" } else { "goal missed" });
            writeln!(f, "| {name} | {value} | {baseline} | {unit} | {ratio} | {goal} | {met} |")?;
        }
        for line in &self.lines {
            if let Some(note) = &line.note {
                writeln!(f, "\n{}: {note}", line.name)?;
            }
        }
        Ok(())
    }
}

fn rounded(value: f64) -> String {
    if value < 100.0 { format!("{value:.2}") } else { format!("{value:.0}") }
}

/// The middle, or the mean of the two in the middle.
pub fn median(samples: &[f64]) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(sorted[middle]),
        _ => Some(f64::midpoint(sorted[middle - 1], sorted[middle])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_the_ratio_of_two_medians() {
        let ours = vec![30.0, 10.0, 20.0, 1000.0, 20.0];
        let line = Line::new("row", "x", ours, vec![10.0, 5.0, 15.0], Goal::RatioMin(2.0));
        assert_eq!((line.value, line.baseline, line.ratio), (20.0, Some(10.0), Some(2.0)));
        assert!(line.met);
        assert_eq!(median(&[4.0, 1.0]), Some(2.5));
    }

    #[test]
    fn a_missed_goal_is_named() {
        let mut report = Report::default();
        report.add(vec![
            Line::new("slow", "x", vec![1.0], vec![2.0], Goal::RatioMin(0.6)),
            Line::new("quick", "ms", vec![2.0], vec![], Goal::ValueMax(3.0)),
            Line::new("late", "ms", vec![4.0], vec![], Goal::ValueMax(3.0)),
            Line::new("near", "x", vec![4.0], vec![2.0], Goal::RatioMax(2.0)),
        ]);
        assert_eq!(report.missed(), ["slow", "late"]);
        assert!(
            report
                .to_string()
                .contains("| slow | 1.00 | 2.00 | x | 0.50 | >= 0.6 x | goal missed |")
        );
    }
}
