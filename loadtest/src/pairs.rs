//! Interleaved pairs: what changes on the machine during a run changes both sides alike.

use std::fmt::Display;

use crate::report::{Goal, Line};

/// The samples of both sides, in the order they were taken.
#[derive(Debug, Default)]
pub struct Pairs {
    /// Ours.
    pub ours: Vec<f64>,
    /// The baseline's.
    pub baseline: Vec<f64>,
}

/// Measures ours and the baseline in turn, after one of each that does not count.
pub async fn interleave<S: Display>(
    count: u32,
    side: impl AsyncFn(Side) -> anyhow::Result<Sample<S>>,
) -> anyhow::Result<Pairs> {
    let mut pairs = Pairs::default();
    for pair in 0..=count {
        let ours = side(Side::Ours).await?;
        let baseline = side(Side::Baseline).await?;
        eprintln!(
            "  {:<8} ours {:>12.2} {}   baseline {:>12.2} {}",
            if pair == 0 { "warm-up".to_owned() } else { format!("{pair}/{count}") },
            ours.value,
            ours.remark,
            baseline.value,
            baseline.remark
        );
        if 0 < pair {
            pairs.ours.push(ours.value);
            pairs.baseline.push(baseline.value);
        }
    }
    Ok(pairs)
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Tidemark.
    Ours,
    /// What it is compared with.
    Baseline,
}

/// One measurement, and what is to be said of it.
#[derive(Debug)]
pub struct Sample<S> {
    /// In the row's unit.
    pub value: f64,
    /// For whoever watches.
    pub remark: S,
}

impl Sample<&'static str> {
    /// Without a remark.
    pub fn plain(value: f64) -> Self {
        Self { value, remark: "" }
    }
}

impl Pairs {
    /// The row of the report.
    pub fn into_line(self, name: &'static str, unit: &'static str, goal: Goal) -> Line {
        Line::new(name, unit, self.ours, self.baseline, goal)
    }
}
