//! A row of a projection that is stored nowhere.

use super::Read;
use crate::{
    answer::Answer,
    error::{Error, Lag},
    forward::Fallback,
    gateway::Role,
    status::Outcome,
};

impl Read<'_> {
    /// The primary folds it from the log; elsewhere the primary is asked, whatever the chain says: there
    /// is nothing here that could become current.
    pub(super) async fn on_demand(&mut self) -> Result<Answer, Error> {
        let answered = match &self.gateway.role {
            Role::Primary(_) => {
                self.outcome = Outcome::Primary;
                self.fold().await?
            }
            Role::Region(_) => self.forward("forward").await,
        };
        // What is stored nowhere has a demand, and nothing that could be behind it.
        let lag = || Lag { demand: Some(self.demand.at()), ..Lag::default() };
        answered.map_err(|fallback| match (fallback, &self.gateway.role) {
            (Fallback::Parked, _) => Error::Parked(lag()),
            (Fallback::Failed, Role::Primary(_)) => Error::ReplicationPending(lag()),
            (Fallback::Failed, Role::Region(_)) => Error::PrimaryUnreachable {
                detail: "the view is made there when it is read, and it did not answer",
                source: None,
            },
        })
    }
}
