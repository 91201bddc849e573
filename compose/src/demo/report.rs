//! What the story prints, and the count of what must not happen.

use serde_json::Value;

use super::caller::Answer;

/// Lines printed so far.
#[derive(Debug, Default)]
pub(super) struct Report {
    broken_count: usize,
    stale_count: usize,
    currencies: Vec<[String; 7]>,
}

impl Report {
    pub(super) fn headline(&self, regions: &[&str]) {
        println!("read your writes in {}\n", regions.join(", "));
        println!(
            "{:<3}{:<36}{:<8}{:<38}{:>9}{:>9}",
            "", "step", "status", "consistency-status", "position", "ms"
        );
    }

    /// A line that shows no state, or state nobody has to compare.
    pub(super) fn step(&mut self, number: &str, title: &str, answer: &Answer, promised: bool) {
        let said = match answer.problem() {
            "" | "blank" => answer.consistency.clone(),
            problem => format!("problem {problem}"),
        };
        let position = answer.body["position"].as_u64().map(|position| position.to_string());
        let position = position.or_else(|| answer.parameter("position").map(str::to_owned));
        let (status, ms) = (answer.status.as_u16(), answer.took.as_millis());
        let mark = if promised { "" } else { "  not as promised" };
        println!(
            "{number:<3}{title:<36}{status:<8}{:<38}{:>9}{ms:>9}{mark}",
            shortened(&said),
            position.unwrap_or_default()
        );
        if !promised {
            self.broken_count += 1;
            println!("   token {:?}\n   {}", answer.token, answer.body);
        }
    }

    /// A row that was read, by a caller who knows of `known` versions.
    pub(super) fn read(
        &mut self,
        number: &str,
        title: &str,
        answer: &Answer,
        known: u64,
        promised: bool,
    ) {
        self.list(number, title, answer, answer.version(), known, promised);
    }

    /// A list that was read, and the version of the caller's order in it.
    pub(super) fn list(
        &mut self,
        number: &str,
        title: &str,
        answer: &Answer,
        shown: Option<u64>,
        known: u64,
        promised: bool,
    ) {
        let confessed = ["stale", "unverified"].contains(&answer.word());
        let is_stale = answer.status == 200 && !confessed && shown.unwrap_or(0) < known;
        self.stale_count += usize::from(is_stale);
        self.step(number, title, answer, promised && !is_stale);
    }

    /// A region's answer to `GET /v1/currency`.
    pub(super) fn currency(&mut self, region: &str, answer: &Answer) {
        let of = |value: &Value, key: &str| match value[key].as_str() {
            Some(text) => text.to_owned(),
            None if value[key].is_null() => String::new(),
            None => value[key].to_string(),
        };
        for projection in answer.body["projections"].as_array().into_iter().flatten() {
            self.currencies.push([
                region.to_owned(),
                of(projection, "name"),
                of(&answer.body, "epoch"),
                of(&answer.body, "head"),
                of(projection, "applied"),
                of(projection, "lag_ms"),
                of(projection, "parked"),
            ]);
        }
    }

    /// Prints the end of the story. True when it was all as promised.
    pub(super) fn conclude(&self) -> bool {
        println!();
        println!(
            "{:<14}{:<14}{:>6}{:>8}{:>10}{:>9}{:>8}",
            "region", "projection", "epoch", "head", "applied", "lag ms", "parked"
        );
        for [region, projection, epoch, head, applied, lag, parked] in &self.currencies {
            println!(
                "{region:<14}{projection:<14}{epoch:>6}{head:>8}{applied:>10}{lag:>9}{parked:>8}"
            );
        }
        println!("\nstale answers: {}", self.stale_count);
        if self.broken_count > 0 {
            println!("steps not as promised: {}", self.broken_count);
        }
        self.broken_count == 0 && self.stale_count == 0 && !self.currencies.is_empty()
    }
}

fn shortened(said: &str) -> String {
    let without_position =
        said.split(';').filter(|part| !part.trim().starts_with("position=")).collect::<Vec<_>>();
    without_position.join(";")
}
