//! Closed loops: each lane sends its next request when the last one is answered.

use std::time::Duration;

use futures::future::try_join_all;
use tokio::time::Instant;

/// What the lanes did.
#[derive(Debug)]
pub struct Load {
    elapsed: Duration,
    /// Of each exchange that ended in time.
    latencies: Vec<Duration>,
}

impl Load {
    /// Exchanges a second.
    pub fn rate(&self) -> f64 {
        self.latencies.len() as f64 / self.elapsed.as_secs_f64()
    }

    /// How long the quickest part of the exchanges took at most, in milliseconds; 0.5 is the median.
    pub fn latency_ms(&self, part: f64) -> f64 {
        percentile_ms(&mut self.latencies.clone(), part)
    }
}

/// How long the quickest part took at most, in milliseconds.
pub fn percentile_ms(latencies: &mut [Duration], part: f64) -> f64 {
    latencies.sort_unstable();
    let last = latencies.len().saturating_sub(1);
    let at = (latencies.len() as f64 * part).ceil() as usize;
    latencies.get(at.saturating_sub(1).min(last)).map_or(f64::NAN, |it| it.as_secs_f64() * 1000.0)
}

/// Lets every lane exchange until the time is over. The last exchange of a lane is waited for, and not
/// counted.
pub async fn closed_loop<L>(
    lanes: &mut [L],
    duration: Duration,
    exchange: impl AsyncFn(&mut L) -> anyhow::Result<()>,
) -> anyhow::Result<Load> {
    let began = Instant::now();
    let end = began + duration;
    let running = lanes.iter_mut().map(async |lane| {
        let mut latencies = Vec::new();
        loop {
            let sent = Instant::now();
            exchange(lane).await?;
            let answered = Instant::now();
            if end <= answered {
                return Ok::<_, anyhow::Error>(latencies);
            }
            latencies.push(answered - sent);
        }
    });
    let latencies = try_join_all(running).await?.concat();
    Ok(Load { elapsed: duration, latencies })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn lanes_are_counted_for_as_long_as_they_run() {
        let mut lanes = [10u64, 20];
        let load = closed_loop(&mut lanes, Duration::from_millis(105), async |pause_ms| {
            tokio::time::sleep(Duration::from_millis(*pause_ms)).await;
            Ok(())
        });
        let load = load.await.unwrap();
        assert_eq!(load.latencies.len(), 10 + 5);
        assert_eq!((load.latency_ms(0.5), load.latency_ms(0.99)), (10.0, 20.0));
    }

    #[test]
    fn a_percentile_is_one_of_the_values() {
        let mut latencies: Vec<_> = (1..=100).rev().map(Duration::from_millis).collect();
        assert_eq!(percentile_ms(&mut latencies, 0.5), 50.0);
        assert_eq!(percentile_ms(&mut latencies, 0.99), 99.0);
        assert_eq!(percentile_ms(&mut latencies, 1.0), 100.0);
    }
}
