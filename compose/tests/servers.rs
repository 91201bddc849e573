//! Single servers: they start, keep or lose what they should, and leave nothing behind.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::Command;
use std::time::Duration;

use async_nats::jetstream;
use compose::nats::{Server, User};
use compose::postgres::{Cluster, Options};
use sqlx::{Connection, PgConnection};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::ChildStdout;

async fn count(url: &str) -> i64 {
    let mut connection = PgConnection::connect(url).await.unwrap();
    sqlx::query_scalar("select count(*) from marks").fetch_one(&mut connection).await.unwrap()
}

async fn execute(url: &str, statement: &'static str) {
    let mut connection = PgConnection::connect(url).await.unwrap();
    sqlx::query(statement).execute(&mut connection).await.unwrap();
}

async fn connect(server: &Server, user: User) -> async_nats::Client {
    let (name, password) = server.credentials(user);
    let options = async_nats::ConnectOptions::with_user_and_password(name, password);
    options.connect(server.url()).await.unwrap()
}

fn runs(pid: u32) -> bool {
    Command::new("kill").args(["-0", &pid.to_string()]).output().unwrap().status.success()
}

#[tokio::test]
async fn a_cluster_keeps_its_commits_and_port_through_stop_and_kill() {
    let mut cluster = Cluster::start(Options::default()).await.unwrap();
    let url = cluster.create_database("tidemark").await.unwrap();
    execute(&url, "create table marks (id bigint)").await;
    execute(&url, "insert into marks values (1)").await;

    cluster.stop().await.unwrap();
    assert!(PgConnection::connect(&url).await.is_err());
    cluster.start_again().await.unwrap();
    assert_eq!(count(&url).await, 1);

    execute(&url, "insert into marks values (2)").await;
    let mut idle = PgConnection::connect(&url).await.unwrap();
    cluster.kill().await.unwrap();
    assert!(idle.ping().await.is_err());
    cluster.start_again().await.unwrap();
    assert_eq!(count(&url).await, 2);
}

#[tokio::test]
async fn a_restored_cluster_has_lost_what_came_after_the_copy() {
    let mut cluster = Cluster::start(Options::default()).await.unwrap();
    let url = cluster.create_database("tidemark").await.unwrap();
    execute(&url, "create table marks (id bigint)").await;
    execute(&url, "insert into marks values (1)").await;
    let copy = cluster.copy_data().await.unwrap();
    execute(&url, "insert into marks values (2)").await;
    assert_eq!(count(&url).await, 2);

    cluster.restore(&copy).await.unwrap();
    assert_eq!(count(&url).await, 1);
}

#[tokio::test]
async fn a_dropped_server_is_gone_with_its_process() {
    let cluster = Cluster::start(Options::default()).await.unwrap();
    let server = Server::start_single().await.unwrap();
    let pids = [cluster.pid().unwrap(), server.pid().unwrap()];
    let folder = cluster.log().parent().unwrap().to_path_buf();
    assert!(pids.iter().all(|pid| runs(*pid)));
    drop((cluster, server));
    assert!(!pids.iter().any(|pid| runs(*pid)));
    assert!(!folder.exists());
}

#[tokio::test]
async fn a_nats_server_keeps_its_stream_until_it_is_wiped() {
    let mut server = Server::start_single().await.unwrap();
    let subjects = vec!["events.>".to_owned()];
    let config = || jetstream::stream::Config {
        name: "EVENTS-1".into(),
        subjects: subjects.clone(),
        ..Default::default()
    };
    let client = connect(&server, User::Relay).await;
    let context = jetstream::new(client);
    context.create_stream(config()).await.unwrap();
    context.publish("events.order.1", "x".into()).await.unwrap().await.unwrap();

    server.stop().await.unwrap();
    server.start_again().await.unwrap();
    let last = async |user| {
        let client = connect(&server, user).await;
        let stream = jetstream::new(client).get_stream("EVENTS-1").await;
        stream.map(|stream| stream.cached_info().state.last_sequence).ok()
    };
    assert_eq!(last(User::Relay).await, Some(1));

    server.kill().await.unwrap();
    server.wipe().await.unwrap();
    server.start_again().await.unwrap();
    let client = connect(&server, User::Operator).await;
    let streams = jetstream::new(client).get_stream("EVENTS-1").await;
    assert!(streams.is_err());
}

#[tokio::test]
async fn a_server_that_cannot_start_says_why() {
    let first = Cluster::start(Options::default()).await.unwrap();
    let taken = Options { port: Some(first.port()), ..Options::default() };
    let error = Cluster::start(taken).await.unwrap_err().to_string();
    assert!(error.contains("could not bind"), "{error}");
}

/// The test runs itself once more as the owner: that one starts two servers, prints them, and waits to be killed.
#[tokio::test]
async fn servers_end_when_their_owner_is_killed() {
    const ROLE: &str = "TIDEMARK_TEST_OWNER";
    if std::env::var_os(ROLE).is_some() {
        let cluster = Cluster::start(Options::default()).await.unwrap();
        let server = Server::start_single().await.unwrap();
        let folders = [cluster.log(), server.log()].map(|log| log.parent().unwrap().to_path_buf());
        println!("folders {} {}", folders[0].display(), folders[1].display());
        println!("pids {} {}", cluster.pid().unwrap(), server.pid().unwrap());
        std::future::pending::<()>().await;
    }
    let mut owner = tokio::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "servers_end_when_their_owner_is_killed", "--nocapture"])
        .env(ROLE, "1")
        .stdout(std::process::Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut output = BufReader::new(owner.stdout.take().unwrap()).lines();
    let folders = printed(&mut output, "folders ").await;
    let pids: Vec<u32> =
        printed(&mut output, "pids ").await.iter().map(|pid| pid.parse().unwrap()).collect();
    assert!(pids.len() == 2 && pids.iter().all(|pid| runs(*pid)));
    owner.kill().await.unwrap();
    let all_gone = async {
        while pids.iter().any(|pid| runs(*pid)) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), all_gone).await.unwrap();
    // A killed owner cannot remove its folders; whoever comes next does.
    let _next = Server::start_single().await.unwrap();
    assert!(folders.iter().all(|folder| !std::path::Path::new(folder).exists()));
}

async fn printed(output: &mut Lines<BufReader<ChildStdout>>, label: &str) -> Vec<String> {
    let words = async {
        loop {
            let line = output.next_line().await.unwrap().expect("the owner prints its servers");
            if let Some((_, words)) = line.split_once(label) {
                return words.split_whitespace().map(str::to_owned).collect();
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), words).await.unwrap()
}
