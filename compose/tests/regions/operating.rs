//! What a region answers while an operator has paused a projection, and while something is parked: over HTTP, from real
//! gateways and projectors, with the operator's own commands.

use compose::demo::caller::{Answer, Caller};
use compose::local::{REGION_DATABASE, Stack};
use compose::process::{Program, run};
use sqlx::PgPool;

use crate::stack::{EUROPE, PATIENCE, add_item, assert_local, caller, place, settled, start};
use crate::topology::eventually;

/// What stands for as long as it takes.
const PATIENT: &str = "wait;ms=20000";
const BY_STATUS: &str = "/v1/views/orders-by-status/placed";

/// Runs the projector's binary with Europe's configuration.
async fn operate(stack: &Stack, arguments: &str) -> String {
    let own = std::env::current_exe().unwrap();
    let binary = own.ancestors().nth(2).unwrap().join("region-projector");
    let folder = stack.addresses().folder;
    let config = folder.join(EUROPE).join("region-projector.toml");
    let program = Program::new("region-projector", binary, folder.join("operator.log"));
    run(program.arg("--config").arg(config).args(arguments.split(' '))).await.unwrap()
}

/// Status, first word, version.
fn told(answer: &Answer) -> (u16, &str, Option<u64>) {
    (answer.status.as_u16(), answer.word(), answer.version())
}

fn refused(answer: &Answer) -> (u16, &str) {
    (answer.status.as_u16(), answer.problem())
}

/// The version of an order in a list.
fn listed(answer: &Answer, order: &str) -> Option<u64> {
    let items = answer.body["items"].as_array()?;
    items.iter().find(|item| item["key"] == order)?["version"].as_u64()
}

async fn is_told_that_it_is_paused(stack: &Stack) {
    let readyz = format!("{}/readyz", stack.region(EUROPE).unwrap().projector.admin_url());
    eventually("the projector rests", async || {
        let Ok(answer) = reqwest::get(&readyz).await else { return false };
        answer.text().await.unwrap_or_default().contains("paused by an operator")
    })
    .await;
}

#[tokio::test]
async fn a_region_with_a_paused_projection_answers_as_one_that_is_behind_and_catches_up_when_resumed()
 {
    let mut stack = start().await;
    let mut europe = caller(&stack, EUROPE);
    let path = place(&mut europe, "o-paused").await;
    let list = "/v1/views/orders-by-customer/customer-of-o-paused";
    let summary = "/v1/views/customer-summary/customer-of-o-paused";
    assert_local(&settled(&mut europe, &path, PATIENCE).await, 1);
    assert_eq!(settled(&mut europe, list, PATIENCE).await.status, 200);

    operate(&stack, "pause orders").await;
    is_told_that_it_is_paused(&stack).await;
    let written = add_item(&mut europe, "o-paused").await;
    let position = written.body["position"].as_u64().unwrap();
    // The other projections are not paused.
    let others = europe.get(summary, PATIENT).await.unwrap();
    assert!(others.status == 200 && ["local", "waited"].contains(&others.word()), "{others:?}");
    assert_eq!(others.body["data"]["total_spent_cents"], 5000, "{others:?}");

    let still = async |caller: &mut Caller| {
        for path in [path.as_str(), list] {
            let pending = caller.clone().get(path, "wait;ms=50, pending").await.unwrap();
            assert_eq!((pending.status.as_u16(), pending.word()), (202, "pending"), "{pending:?}");
            assert_eq!(pending.body["demand"], position, "{pending:?}");
            assert!(pending.body["applied"].as_u64().unwrap() < position, "{pending:?}");
            assert!(pending.retry_after.is_some(), "{pending:?}");
            let out_of_time = caller.clone().get(path, "wait;ms=50").await.unwrap();
            assert_eq!(refused(&out_of_time), (503, "replication-pending"), "{out_of_time:?}");
            assert!(out_of_time.retry_after.is_some(), "{out_of_time:?}");
        }
    };
    still(&mut europe).await;
    for policy in ["", "forward", "wait;ms=1, forward"] {
        let row = europe.clone().get(&path, policy).await.unwrap();
        assert_eq!(told(&row), (200, "forwarded", Some(2)), "{policy}: {row:?}");
    }
    let row = europe.clone().get(&path, "primary").await.unwrap();
    assert_eq!(told(&row), (200, "primary", Some(2)), "{row:?}");
    let row = europe.clone().get(&path, "eventual").await.unwrap();
    assert_eq!(told(&row), (200, "stale", Some(1)), "{row:?}");
    let row = europe.stranger().get(&path, "").await.unwrap();
    assert_eq!(told(&row), (200, "local", Some(1)), "who demands nothing is owed nothing: {row:?}");
    let page = europe.clone().get(list, "forward").await.unwrap();
    assert_eq!((page.word(), listed(&page, "o-paused")), ("forwarded", Some(2)), "{page:?}");

    // It is the projection that is paused, and not the process.
    let http = reqwest::Client::new();
    let region = stack.region_mut(EUROPE).unwrap();
    region.projector.kill().await;
    region.projector.start_again().unwrap();
    region.projector.wait_until_ready(&http, PATIENCE).await.unwrap();
    is_told_that_it_is_paused(&stack).await;
    still(&mut europe).await;

    let mut waiting = europe.clone();
    let (row, _) = tokio::join!(waiting.get(&path, PATIENT), operate(&stack, "resume orders"));
    let row = row.unwrap();
    assert_eq!(told(&row), (200, "waited", Some(2)), "{row:?}");
    let page = europe.get(list, PATIENT).await.unwrap();
    assert_eq!((page.status.as_u16(), listed(&page, "o-paused")), (200, Some(2)), "{page:?}");
    assert_local(&europe.get(&path, "").await.unwrap(), 2);
    stack.stop().await.unwrap();
}

/// The region's database refuses the order's row from now on.
async fn poison(pool: &PgPool) {
    let check = "alter table orders_v1_order_detail add constraint poison
                 check (aggregate_id <> 'o-parked' or (data->>'total_cents')::bigint < 5000) not valid";
    sqlx::query(check).execute(pool).await.unwrap();
}

async fn cure(pool: &PgPool) {
    let cure = "alter table orders_v1_order_detail drop constraint poison";
    sqlx::query(cure).execute(pool).await.unwrap();
}

/// Every answer about the parked order, whose row shows `shown` here and is at `newest` in truth.
async fn assert_parked(writer: &Caller, path: &str, shown: u64, newest: u64) {
    let list = format!("{BY_STATUS}?limit=50");
    // Its writer is never told that all is well, nor shown what it has passed.
    for path in [path, list.as_str()] {
        let refused_here = writer.clone().get(path, PATIENT).await.unwrap();
        assert_eq!(refused(&refused_here), (503, "parked"), "{path}: {refused_here:?}");
        let pending = writer.clone().get(path, "wait;ms=5, pending").await.unwrap();
        assert_eq!((pending.status.as_u16(), pending.word()), (202, "pending"), "{pending:?}");
        let stale = writer.clone().get(path, "eventual").await.unwrap();
        assert_eq!((stale.status.as_u16(), stale.word()), (200, "stale"), "{stale:?}");
        assert_eq!(stale.parameter("reason"), Some("parked"), "{stale:?}");
    }
    let row = writer.clone().get(path, "").await.unwrap();
    assert_eq!(told(&row), (200, "forwarded", Some(newest)), "{row:?}");
    let page = writer.clone().get(&list, "forward").await.unwrap();
    assert_eq!((page.word(), listed(&page, "o-parked")), ("forwarded", Some(newest)), "{page:?}");

    // Nor is one whose token has dropped the claim.
    let mut forgetful = writer.clone();
    for order in ["o-1", "o-2"] {
        place(&mut forgetful, &format!("{order}-after-{newest}")).await;
    }
    for path in [path, list.as_str()] {
        let refused_here = forgetful.clone().get(path, PATIENT).await.unwrap();
        assert_eq!(refused(&refused_here), (503, "parked"), "{path}: {refused_here:?}");
    }

    // Whoever else asks is served and told, and the row as of before is no lie.
    let mut other = writer.stranger();
    place(&mut other, &format!("o-other-{newest}")).await;
    for (caller, who) in [(&other, "who has written another"), (&writer.stranger(), "a stranger")] {
        assert_local(&caller.clone().get(path, PATIENT).await.unwrap(), shown);
        let mut caller = caller.clone();
        let page = caller.get(&list, PATIENT).await.unwrap();
        assert_eq!((page.status.as_u16(), page.word()), (200, "stale"), "{who}: {page:?}");
        assert_eq!(page.parameter("reason"), Some("parked"), "{who}: {page:?}");
        assert_eq!(listed(&page, "o-parked"), Some(shown), "{who}: {page:?}");
        // By then it has seen a world in which the row is not what it was.
        let row = caller.clone().get(path, PATIENT).await.unwrap();
        assert_eq!(refused(&row), (503, "parked"), "{who}: {row:?}");
        let row = caller.clone().get(path, "").await.unwrap();
        assert_eq!(told(&row), (200, "forwarded", Some(newest)), "{who}: {row:?}");
    }
    let own = format!("/v1/views/order-detail/o-other-{newest}");
    assert_local(&other.get(&own, PATIENT).await.unwrap(), 1);
}

/// Its writer, strangers and lists: all as of this version, here.
async fn assert_current(writer: &Caller, path: &str, version: u64) {
    for mut caller in [writer.clone(), writer.stranger()] {
        assert_local(&caller.get(path, PATIENT).await.unwrap(), version);
        let page = caller.get(&format!("{BY_STATUS}?limit=50"), PATIENT).await.unwrap();
        assert_eq!(listed(&page, "o-parked"), Some(version), "{page:?}");
        assert!(["local", "waited"].contains(&page.word()), "{page:?}");
    }
}

#[tokio::test]
async fn a_parked_aggregate_is_told_of_until_its_letters_are_retried_or_discarded() {
    let stack = start().await;
    let mut writer = caller(&stack, EUROPE);
    let path = place(&mut writer, "o-parked").await;
    assert_local(&settled(&mut writer, &path, PATIENCE).await, 1);
    let url = stack.region(EUROPE).unwrap().postgres.url(REGION_DATABASE);
    let pool = PgPool::connect(&url).await.unwrap();

    poison(&pool).await;
    add_item(&mut writer, "o-parked").await;
    assert_parked(&writer, &path, 1, 2).await;
    cure(&pool).await;
    let said = operate(&stack, "dead-letters retry orders order o-parked").await;
    assert_eq!(said, "1 letters of order/o-parked applied, not parked any more\n");
    assert_current(&writer, &path, 2).await;

    poison(&pool).await;
    let written = add_item(&mut writer, "o-parked").await;
    assert_parked(&writer, &path, 2, 3).await;
    let position = written.body["position"].as_u64().unwrap();
    let discard = format!("dead-letters discard orders order o-parked --position {position}");
    cure(&pool).await;
    let said = operate(&stack, &discard).await;
    assert!(said.contains("not parked any more"), "{said}");
    assert_current(&writer, &path, 3).await;
    let row = writer.get(&path, "").await.unwrap();
    assert_eq!(row.body["data"]["total_cents"], 5000, "what was given up is not in it: {row:?}");
    // The next event follows, and adds to what is here.
    add_item(&mut writer, "o-parked").await;
    let row = writer.get(&path, PATIENT).await.unwrap();
    assert_local(&row, 4);
    assert_eq!(row.body["data"]["total_cents"], 7500, "{row:?}");
    stack.stop().await.unwrap();
}
