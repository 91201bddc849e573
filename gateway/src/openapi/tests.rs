use std::collections::BTreeSet;

use matchit::Router;
use process::config::load_from;

use super::*;

fn config(more: &str) -> GatewayConfig {
    let text = format!(
        r#"
        region = "eu-west"
        listen.address = "127.0.0.1:0"
        admin.address = "127.0.0.1:0"
        log.id = "00000000-0000-0000-0000-000000000001"
        token = {{ signing_key = 1, keys = [{{ id = 1, secret = "0123456789abcdef0123456789abcdef" }}] }}
        database.url = "postgres://127.0.0.1/region"
        nats.url = "nats://127.0.0.1:4222"
        primary_region = {{ name = "us-east", url = "http://127.0.0.1:8081" }}
        regions.credential = "0123456789abcdef"
        {more}
        "#
    );
    load_from(text.parse().unwrap(), "GATEWAY", []).unwrap()
}

fn described(more: &str) -> Value {
    let domain = orders::domain().unwrap();
    serde_json::from_slice(&document(&config(more), &domain)).unwrap()
}

fn plain() -> Value {
    described("auth.mode = \"none\"")
}

/// Every string under a key, wherever it stands.
fn strings<'v>(value: &'v Value, key: &str, found: &mut Vec<&'v str>) {
    match value {
        Value::Object(members) => {
            found.extend(members.get(key).and_then(Value::as_str));
            members.values().for_each(|member| strings(member, key, found));
        }
        Value::Array(items) => items.iter().for_each(|item| strings(item, key, found)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[test]
fn every_reference_leads_somewhere_and_no_operation_has_the_name_of_another() {
    let document = plain();
    let mut references = Vec::new();
    strings(&document, "$ref", &mut references);
    assert!(100 < references.len());
    for reference in references {
        let target = document.pointer(reference.strip_prefix('#').unwrap());
        assert!(target.is_some(), "{reference}");
    }
    let mut names = Vec::new();
    strings(&document, "operationId", &mut names);
    assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len());
}

#[test]
fn every_route_is_described_with_its_methods_and_nothing_else_is() {
    let mut router = Router::new();
    for (pattern, route) in Route::ALL {
        router.insert(pattern, route).unwrap();
    }
    let document = plain();
    let mut met = Vec::new();
    for (path, operations) in document["paths"].as_object().unwrap() {
        let route = *router.at(path).unwrap_or_else(|_| panic!("{path} leads nowhere")).value;
        let methods = operations.as_object().unwrap().keys().map(|key| key.to_uppercase());
        assert_eq!(methods.collect::<Vec<_>>().join(", "), route.methods(), "{path}");
        met.push(route);
    }
    for (pattern, route) in Route::ALL {
        assert!(met.contains(&route), "{pattern} is not described");
    }
}

#[test]
fn commands_views_and_aggregates_of_the_domain_have_paths_and_shapes_of_their_own() {
    let document = plain();
    let domain = orders::domain().unwrap();
    for command in domain.commands() {
        let path = format!("/v1/commands/{}", command.name());
        let body = &document["paths"][path]["post"]["requestBody"]["content"]["application/json"];
        let properties = body["schema"]["properties"].as_object().unwrap();
        assert!(!properties.is_empty(), "{}", command.name());
    }
    let view = |path: &str, pointer: &str| {
        let answer = &document["paths"][path]["get"]["responses"]["200"];
        answer["content"]["application/json"]["schema"].pointer(pointer).cloned().unwrap()
    };
    let row = view("/v1/views/order-detail/{key}", "/properties/data");
    assert_eq!(row["$ref"], "#/components/schemas/OrderDetail");
    let hit = "/properties/items/items/properties/data";
    let hit = view("/v1/views/product-search", hit);
    assert_eq!(hit["$ref"], "#/components/schemas/ProductHit");
    let state = view("/v1/aggregates/order/{id}", "/properties/state");
    assert_eq!(state["$ref"], "#/components/schemas/Order");
    let append = &document["paths"]["/v1/aggregates/order/{id}/events"]["post"];
    let forms = &append["requestBody"]["content"]["application/json"]["schema"]["properties"];
    let forms = forms["events"]["items"]["anyOf"].as_array().unwrap();
    let placed = forms.iter().find(|form| form["title"] == "OrderPlaced").unwrap();
    assert_eq!(placed["properties"]["schema_version"]["const"], 3);
    assert!(placed["properties"]["data"]["properties"].get("customer_id").is_some(), "{placed}");
}

#[test]
fn every_type_of_problem_is_described() {
    let document = plain();
    for kind in Kind::ALL {
        let response = &document["components"]["responses"][kind.name()];
        assert!(response["description"].as_str().unwrap().contains(kind.about()), "{kind:?}");
    }
}

#[test]
fn how_callers_prove_who_they_are_follows_from_the_configuration() {
    let of = |document: &Value, path: &str| {
        document["paths"][path]["get"]["responses"].as_object().unwrap().contains_key("401")
    };
    let none = plain();
    assert_eq!(none["security"], json!([]));
    assert!(!of(&none, "/v1/currency") && of(&none, "/internal/log"));
    let header = described(
        "auth = { mode = \"trusted-header\", trusted_header = { name = \"x-user\", addresses = [\"10.0.0.0/8\"] } }",
    );
    assert_eq!(header["security"], json!([{ "caller": [] }]));
    assert_eq!(header["components"]["securitySchemes"]["caller"]["name"], "x-user");
    assert!(of(&header, "/v1/currency"));
}

#[test]
fn routes_to_services_are_described_as_theirs() {
    let route = "[[route]]\nprefix = \"/shop\"\nupstream = \"http://127.0.0.1:9000\"\nprojection = \"orders\"";
    let document = described(&format!("auth.mode = \"none\"\n{route}"));
    for path in ["/shop", "/shop/{path}"] {
        let reads = &document["paths"][path]["get"];
        assert!(
            reads["responses"].get("default").is_some() && reads["responses"].get("504").is_some()
        );
        assert_eq!(document["paths"][path]["put"]["summary"], "Goes to the primary");
    }
    assert!(plain()["paths"].get("/shop").is_none());
}
