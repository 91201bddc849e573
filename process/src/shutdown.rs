//! How a process is asked to end, and how long it may take.

use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// A token that is cancelled by the first SIGTERM or SIGINT. The listening task lives as long as
/// the process.
pub fn on_signal() -> std::io::Result<CancellationToken> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let asked = CancellationToken::new();
    let ask = asked.clone();
    tokio::spawn(async move {
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        };
        tracing::info!(signal = name, "asked to shut down");
        ask.cancel();
    });
    Ok(asked)
}

/// Gives `work` the grace period to finish. `None`, and a warning, when it is late.
pub async fn within<T>(
    grace: Duration,
    what: &'static str,
    work: impl Future<Output = T>,
) -> Option<T> {
    match tokio::time::timeout(grace, work).await {
        Ok(done) => Some(done),
        Err(_) => {
            tracing::warn!(
                what,
                grace_ms = grace.as_millis() as u64,
                "late to shut down, left behind"
            );
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn work_that_does_not_end_is_left_behind() {
        assert_eq!(within(Duration::from_secs(5), "ends", async { 1 }).await, Some(1));
        let never = std::future::pending::<()>();
        assert_eq!(within(Duration::from_secs(5), "hangs", never).await, None);
    }
}
