//! A primary that is far away, or busy: pages of its log that are too large to come in time.

use consistency::{Epoch, Position};
use process::config::{Period, Secret, SecretUrl};
use region_projector::config::PrimaryLogConfig;
use region_projector::log::{LogClient, LogError};

use crate::log::{CREDENTIAL, TestLog};

#[tokio::test]
async fn a_page_that_is_too_slow_is_asked_for_smaller_until_it_comes() {
    let log = TestLog::start().await;
    for nth in 0..60 {
        log.append(&format!("t-{}", nth % 7), "Added", "1");
    }
    log.set_quick_events_max(8);
    let url = format!("http://{}", log.address);
    let config = PrimaryLogConfig {
        url: SecretUrl::new(url),
        tls_ca: None,
        credential: Secret::new(CREDENTIAL),
        deadline: Period::from_millis(200),
        page_events_max: 50,
        poll_interval: Period::from_millis(100),
        bridge_events_max: 1000,
    };
    let client = LogClient::new(&config).unwrap().of_region("eu-west");
    let mut read = Vec::new();
    let mut late = 0;
    while read.len() < 60 {
        let after = Position::new(read.len() as u64).unwrap();
        match client.read(Epoch::FIRST, after, 50).await {
            Ok(page) => read.extend(page.events),
            Err(LogError::Deadline) => late += 1,
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!(read, log.events());
    assert!(0 < late, "the first page was too large");
}
