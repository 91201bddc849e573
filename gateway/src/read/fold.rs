//! A row made from the log, at the primary, by the code that the projector makes it with.

use std::sync::Arc;

use consistency::{LogPosition, Scope, Version};
use projection::{Folded, ProjectionDefinition, ProjectionError};

use super::{Read, Target};
use crate::{
    answer::{Answer, read_of},
    error::Error,
    fold::{self, FoldError, Rules},
    forward::Fallback,
    gateway::Role,
};

impl Read<'_> {
    /// The row from the log. Shows the aggregate's last position, or the head when it has no events.
    pub(super) async fn fold(&mut self) -> Result<Result<Answer, Fallback>, Error> {
        let folding = tokio::time::timeout_at(self.call.deadline, self.folded());
        let (folded, head) = match folding.await {
            Ok(Ok(folded)) => folded,
            Ok(Err(FoldError::Poison(error))) => {
                tracing::debug!(%error, "row not folded");
                return Ok(Err(Fallback::Parked));
            }
            Ok(Err(error @ (FoldError::Read(_) | FoldError::TooLong(_)))) => {
                tracing::debug!(%error, "row not folded");
                return Ok(Err(Fallback::Failed));
            }
            Err(_) => return Ok(Err(Fallback::Failed)),
        };
        // What the log itself does not have cannot be shown by anybody.
        if head < self.demand.at() {
            return Ok(Err(Fallback::Failed));
        }
        let at = if folded.version() == Version::ZERO { head } else { folded.at() };
        // Nor is it worth a wait: whoever knows of a version knows it from the log.
        if folded.version() < self.demand.min_version().unwrap_or_default() {
            return Err(Error::VersionConflict { current: folded.version(), at });
        }
        let said = self.said(self.outcome, Some(at), Some("folded"));
        let answer = match self.folded_row(&folded) {
            Ok(Some(data)) => {
                let version = self.version().unwrap_or(self.target.newest_version);
                self.row_answer(version, folded.at(), folded.version(), &data)
            }
            Ok(None) => self.absent(),
            Err(error) => {
                tracing::debug!(%error, "row not made");
                return Ok(Err(Fallback::Parked));
            }
        };
        Ok(Ok(answer.saying(said).showing(read_of(at))))
    }

    /// The folded aggregate, and a head that was read before it.
    async fn folded(&self) -> Result<(Folded, LogPosition), FoldError> {
        let (Role::Primary(store), Scope::Row(_), Some(aggregate)) =
            (&self.gateway.role, self.target.scope, self.target.aggregate())
        else {
            return Ok((Folded::nothing(), LogPosition::ORIGIN));
        };
        let head = store.head().await?.at;
        let definition = self.rules();
        let document = definition.as_deref().and_then(ProjectionDefinition::document);
        let rules = definition.as_deref().zip(document);
        let Some(rules) =
            rules.map(|(definition, document)| Rules::Projection(definition, document))
        else {
            return Ok((Folded::nothing(), LogPosition::ORIGIN));
        };
        Ok((fold::aggregate(self.gateway, store, aggregate, rules).await?, head))
    }

    /// Those of the version that is read, or the newest while none is known.
    fn rules(&self) -> Option<Arc<ProjectionDefinition>> {
        let Target { projection, newest_version, .. } = &self.target;
        self.definition().or_else(|| {
            let newest = self.gateway.domain.projection(projection.as_str(), *newest_version);
            newest.cloned().map(Arc::new)
        })
    }

    fn folded_row(&self, folded: &Folded) -> Result<Option<String>, ProjectionError> {
        let definition = self.rules();
        let document = definition.as_deref().and_then(ProjectionDefinition::document);
        let (Some(document), Some(aggregate)) = (document, self.target.aggregate()) else {
            return Ok(None);
        };
        document.row(aggregate, folded, &self.target.view)
    }
}
