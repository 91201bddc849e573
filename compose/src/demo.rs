//! The read-your-writes story, told with real requests to three running regions.
//!
//! [`caller`] is all that a client of the gateways needs: keep the token of each answer, send it with the next request.

pub mod caller;
mod report;

use std::time::Duration;

use http::StatusCode;
use serde_json::json;
use tokio::time::{Instant, sleep};

use crate::local::{PRIMARY, Stack, http_link};
use crate::nats::event_link;
use crate::proxy::Proxies;

use caller::{Answer, Caller, CallerError};
use report::Report;

const EUROPE: &str = "eu-west";
const ASIA: &str = "asia-south";
const CUSTOMER: &str = "ada";
const PRODUCT: &str = "tide-table";
const ORDER: &str = "order-1";
const DETAIL: &str = "/v1/views/order-detail/order-1";

/// The customer and the product.
const SCENE_EVENT_COUNT: u64 = 2;

/// How long a healed region may take to catch up before the story counts as broken.
const CATCH_UP_DEADLINE: Duration = Duration::from_secs(30);

/// Tells the story, one line a step, on standard output. True when every step was as promised.
pub async fn tell(stack: &Stack) -> Result<bool, CallerError> {
    let url =
        |region: &str| stack.region(region).map(|region| region.url.clone()).unwrap_or_default();
    let mut story = Story {
        proxies: &stack.proxies,
        europe: Caller::new(url(EUROPE))?,
        asia: Caller::new(url(ASIA))?,
        report: Report::default(),
    };
    story.report.headline(&[PRIMARY, EUROPE, ASIA]);
    story.set_the_scene().await?;
    wait_until_everywhere(stack).await?;
    story.write_and_read_back().await?;
    story.cut_the_event_link().await?;
    story.read_lists_in_asia().await?;
    story.cut_both_links().await?;
    story.forge_a_token().await?;
    for region in &stack.regions {
        let currency = Caller::new(region.url.clone())?.get("/v1/currency", "").await?;
        story.report.currency(&region.name, &currency);
    }
    Ok(story.report.conclude())
}

/// Streams and mirrors are made at the first start, which takes seconds. The story is not about that.
async fn wait_until_everywhere(stack: &Stack) -> Result<(), CallerError> {
    let start = Instant::now();
    for region in &stack.regions {
        let mut caller = Caller::new(region.url.clone())?;
        let mut is_behind = true;
        while is_behind && start.elapsed() < CATCH_UP_DEADLINE {
            let currency = caller.get("/v1/currency", "").await?.body;
            let projections = currency["projections"].as_array();
            let applied =
                projections.and_then(|all| all.iter().map(|p| p["applied"].as_u64()).min());
            is_behind = applied.flatten() < Some(SCENE_EVENT_COUNT);
            sleep(Duration::from_millis(50)).await;
        }
    }
    Ok(())
}

struct Story<'a> {
    proxies: &'a Proxies,
    europe: Caller,
    asia: Caller,
    report: Report,
}

impl Story<'_> {
    /// An order needs a customer and a product.
    async fn set_the_scene(&mut self) -> Result<(), CallerError> {
        let customer = json!({"customer_id": CUSTOMER, "name": "Ada"});
        let answer = self.europe.write("RegisterCustomer", &customer).await?;
        self.report.step("0", "register a customer through EU", &answer, was_written(&answer));
        let product = json!({"product_id": PRODUCT, "name": "Tide table", "price_cents": 2500});
        let answer = self.europe.write("CreateProduct", &product).await?;
        self.report.step("0", "create a product through EU", &answer, was_written(&answer));
        Ok(())
    }

    async fn write_and_read_back(&mut self) -> Result<(), CallerError> {
        let items = json!([{"product_id": PRODUCT, "quantity": 2}]);
        let order = json!({"order_id": ORDER, "customer_id": CUSTOMER, "items": items});
        let answer = self.europe.write("PlaceOrder", &order).await?;
        let promised = answer.status == StatusCode::CREATED && answer.token.is_some();
        self.report.step("1", "create an order through EU", &answer, promised);

        // Of its own choice it would ask the primary when that is expected to be quicker.
        let answer = self.europe.get(DETAIL, "wait;ms=5000, forward").await?;
        let promised = is_current(&answer, 1) && is_local(&answer);
        self.report.read("2", "read it in EU with the token", &answer, 1, promised);

        // Without a token nothing is demanded, so any state of this region is a right answer.
        let mut stranger = self.europe.stranger();
        let answer = stranger.get(DETAIL, "").await?;
        self.report.read(
            "3",
            "the same without a token",
            &answer,
            0,
            answer.status == StatusCode::OK,
        );
        Ok(())
    }

    /// Events stop; requests still pass.
    async fn cut_the_event_link(&mut self) -> Result<(), CallerError> {
        self.proxies.set_enabled(&event_link(EUROPE), false).await?;
        let item = json!({"order_id": ORDER, "product_id": PRODUCT, "quantity": 1});
        let answer = self.europe.write("AddItem", &item).await?;
        self.report.step("4", "event link to EU cut: add an item", &answer, was_written(&answer));

        let answer = self.europe.get(DETAIL, "wait;ms=200, pending").await?;
        let explained = answer.retry_after.is_some() && answer.body.is_object();
        let promised = answer.status == StatusCode::ACCEPTED && explained;
        self.report.read("4", "  read, wait;ms=200, pending", &answer, 2, promised);

        let answer = self.europe.get(DETAIL, "wait;ms=50, forward").await?;
        let promised = is_current(&answer, 2) && answer.word() == "forwarded";
        self.report.read("5", "  read, wait;ms=50, forward", &answer, 2, promised);

        self.proxies.set_enabled(&event_link(EUROPE), true).await?;
        let answer = self.read_until_local().await?;
        let promised = is_current(&answer, 2) && is_local(&answer);
        self.report.read("6", "link healed: the same token", &answer, 2, promised);
        Ok(())
    }

    /// Asks again while the answer is "not yet", as a client told to retry would.
    async fn read_until_local(&mut self) -> Result<Answer, CallerError> {
        let start = Instant::now();
        loop {
            let mut answer = self.europe.get(DETAIL, "wait;ms=2000, pending").await?;
            if answer.status != StatusCode::ACCEPTED || start.elapsed() > CATCH_UP_DEADLINE {
                answer.took = start.elapsed();
                return Ok(answer);
            }
        }
    }

    /// A token is good everywhere, and for lists too.
    async fn read_lists_in_asia(&mut self) -> Result<(), CallerError> {
        self.asia.adopt(&self.europe);
        let of_customer = format!("/v1/views/orders-by-customer/{CUSTOMER}");
        let lists = [
            ("the customer's orders in Asia", of_customer.as_str()),
            ("orders by status in Asia", "/v1/views/orders-by-status/placed"),
        ];
        for (title, path) in lists {
            let answer = self.asia.get(path, "").await?;
            let promised = answer.status == StatusCode::OK && item_version(&answer) >= Some(2);
            self.report.list("7", title, &answer, item_version(&answer), 2, promised);
        }
        Ok(())
    }

    /// Europe is on its own.
    async fn cut_both_links(&mut self) -> Result<(), CallerError> {
        let links = [event_link(EUROPE), http_link(EUROPE)];
        for link in &links {
            self.proxies.set_enabled(link, false).await?;
        }
        // A write on a connection that nobody has noticed to be dead has an unknown outcome, and says so. A read may
        // be sent again, so it finds out.
        let answer = self.europe.get(DETAIL, "primary").await?;
        let refused = answer.status == StatusCode::SERVICE_UNAVAILABLE;
        self.report.step("8", "both links cut: read, primary", &answer, refused);

        let item = json!({"order_id": ORDER, "product_id": PRODUCT, "quantity": 1});
        let answer = self.europe.command("AddItem", &item).await?;
        let refused = answer.status == StatusCode::SERVICE_UNAVAILABLE;
        let promised =
            refused && answer.problem() == "primary-unreachable" && answer.retry_after.is_some();
        self.report.step("8", "  add an item", &answer, promised);

        let answer = self.europe.get(DETAIL, "eventual").await?;
        let said = ["stale", "local"].contains(&answer.word());
        self.report.read(
            "8",
            "  read, eventual",
            &answer,
            2,
            answer.status == StatusCode::OK && said,
        );

        for link in &links {
            self.proxies.set_enabled(link, true).await?;
        }
        let answer = self.europe.write("AddItem", &item).await?;
        self.report.step("8", "  links healed: add an item", &answer, was_written(&answer));
        let answer = self.read_until_local().await?;
        self.report.read(
            "8",
            "  read it in EU",
            &answer,
            3,
            is_current(&answer, 3) && is_local(&answer),
        );
        Ok(())
    }

    async fn forge_a_token(&mut self) -> Result<(), CallerError> {
        let mut forger = self.europe.forger();
        let answer = forger.get(DETAIL, "").await?;
        let promised =
            answer.status == StatusCode::BAD_REQUEST && answer.problem() == "invalid-token";
        self.report.step("9", "a forged token", &answer, promised);
        Ok(())
    }
}

fn was_written(answer: &Answer) -> bool {
    [StatusCode::OK, StatusCode::CREATED].contains(&answer.status) && answer.token.is_some()
}

fn is_current(answer: &Answer, version: u64) -> bool {
    answer.status == StatusCode::OK && answer.version() >= Some(version)
}

fn is_local(answer: &Answer) -> bool {
    ["local", "waited"].contains(&answer.word())
}

/// The version of the story's order in a list, if it is there.
fn item_version(answer: &Answer) -> Option<u64> {
    let items = answer.body["items"].as_array()?;
    items.iter().find(|item| item["key"] == ORDER)?["version"].as_u64()
}
