//! What is wrong with a configuration, all of it together.

use consistency::Policy;
use process::{config::Config, tls};

use super::{CorsConfig, GatewayConfig, RateLimitConfig};

impl Config for GatewayConfig {
    fn mistakes(&self) -> Vec<String> {
        let mut mistakes = self.admin.mistakes();
        mistakes.extend(self.place_mistakes());
        mistakes.extend(self.policy_mistakes());
        mistakes.extend(self.bound_mistakes());
        mistakes.extend(self.events.mistakes());
        let routes = self.routes.iter().enumerate();
        mistakes.extend(routes.flat_map(|(nth, route)| route.mistakes(&format!("route.{nth}"))));
        mistakes.extend(self.auth.mistakes());
        mistakes.extend(self.rate_limit.iter().flat_map(RateLimitConfig::mistakes));
        mistakes.extend(self.cors.iter().flat_map(CorsConfig::mistakes));
        mistakes.extend(self.tls_mistakes());
        mistakes.extend(self.key_ring().err().map(|error| format!("token: {error}")));
        if self.regions.credential.expose().len() < 16 {
            mistakes.push("regions.credential: must have at least 16 bytes".to_owned());
        }
        mistakes
    }
}

impl GatewayConfig {
    fn policy_mistakes(&self) -> Vec<String> {
        let default = ("read.policy".to_owned(), &self.read.policy);
        let views = self.views.iter().map(|(view, c)| (format!("views.{view}.policy"), &c.policy));
        std::iter::once(default)
            .chain(views)
            .filter_map(|(key, text)| Some(format!("{key}: {}", Policy::parse(text).err()?)))
            .collect()
    }

    fn place_mistakes(&self) -> Vec<String> {
        let mut mistakes = Vec::new();
        let mut demand = |holds: bool, mistake: &str| {
            if !holds {
                mistakes.push(mistake.to_owned());
            }
        };
        if self.primary {
            demand(self.log_database.is_some(), "log_database: must be set at the primary");
            demand(self.relay.is_some(), "relay: must be set at the primary");
            demand(self.primary_region.is_none(), "primary_region: this region is the primary");
        } else {
            demand(self.log_database.is_none(), "log_database: only the primary has the log");
            demand(self.relay.is_none(), "relay: only the primary runs a relay");
            demand(self.primary_region.is_some(), "primary_region: must be set");
        }
        if let Some(relay) = &self.relay {
            let count = relay.stream_replica_count;
            demand((1..=5).contains(&count), "relay.stream_replica_count: must be from 1 to 5");
            // The stream would lose an event that the log has just taken.
            let room = relay.stream_bytes_max.is_none_or(|max| {
                usize::try_from(max).is_ok_and(|max| self.write.event_bytes_max < max)
            });
            demand(room, "relay.stream_bytes_max: must be above write.event_bytes_max");
        }
        if let Some(primary) = &self.primary_region {
            demand(primary.name != self.region, "primary_region.name: is this region");
            let url = primary.url.parse::<http::Uri>().ok();
            let whole = url.is_some_and(|url| {
                matches!(url.scheme_str(), Some("http" | "https")) && url.host().is_some()
            });
            demand(whole, "primary_region.url: must be a URL like http://10.0.0.1:8080");
            demand(0 < primary.forwards_max, "primary_region.forwards_max: must be above zero");
            let room = primary.forwarded_reads_max < primary.forwards_max;
            demand(room, "primary_region.forwarded_reads_max: must be below forwards_max");
        }
        mistakes
    }

    fn tls_mistakes(&self) -> Vec<String> {
        let mut mistakes = self.nats.mistakes();
        mistakes.extend(self.listen.tls.iter().flat_map(|own| own.mistakes("listen.tls")));
        let primary = self.primary_region.as_ref().and_then(|primary| primary.tls_ca.as_deref());
        mistakes.extend(tls::roots_mistakes("primary_region.tls_ca", primary));
        mistakes
    }

    fn bound_mistakes(&self) -> Vec<String> {
        let bounds = [
            (self.listen.body_bytes_max, "listen.body_bytes_max"),
            (self.listen.requests_max, "listen.requests_max"),
            (self.listen.limits.header_count_max, "listen.limits.header_count_max"),
            (
                self.listen.limits.answer_stall_max.millis() as usize,
                "listen.limits.answer_stall_max",
            ),
            (self.read.waiters_max, "read.waiters_max"),
            (self.read.waiters_per_caller_max, "read.waiters_per_caller_max"),
            (self.read.released_max, "read.released_max"),
            (self.read.queries_max, "read.queries_max"),
            (self.read.gather_queries_max, "read.gather_queries_max"),
            (self.read.gather_keys_max, "read.gather_keys_max"),
            (self.read.memory_slots_per_partition, "read.memory_slots_per_partition"),
            (self.read.page_items_default as usize, "read.page_items_default"),
            (self.write.events_max, "write.events_max"),
            (self.regions.log_bytes_per_second_max as usize, "regions.log_bytes_per_second_max"),
            (self.write.command_attempts_max as usize, "write.command_attempts_max"),
            (self.write.idempotency_age_max.millis() as usize, "write.idempotency_age_max"),
            (self.read.poll_interval.millis() as usize, "read.poll_interval"),
            (self.read.query_timeout.millis() as usize, "read.query_timeout"),
            (self.read.refresh_interval.millis() as usize, "read.refresh_interval"),
            (self.listen.request_timeout.millis() as usize, "listen.request_timeout"),
        ];
        let zero = bounds.iter().filter(|(bound, _)| *bound == 0);
        let mut mistakes: Vec<String> =
            zero.map(|(_, key)| format!("{key}: must be above zero")).collect();
        if self.read.page_items_max < self.read.page_items_default {
            mistakes.push("read.page_items_default: is above read.page_items_max".to_owned());
        }
        mistakes
    }
}
