//! What routers report to each other.

use std::{sync::Arc, time::Duration};

use futures_util::future::join_all;
use streamer_core::Clock;
use streamer_proto::internal::v1::{
    AdmittedSubmissions, ReportSubmissionsRequest, ReportSubmissionsResponse,
    admission_service_client::AdmissionServiceClient, admission_service_server::AdmissionService,
};
use streamer_rpc::{Member, Members};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::{Name, SubmissionRates};

const REPORT_INTERVAL: Duration = Duration::from_secs(1);
const REPORT_TIMEOUT: Duration = Duration::from_secs(1);
/// Bytes of one report at most, the largest counts first.
const MAX_REPORT_BYTES: usize = 1024 * 1024;
/// Entries of a report that are looked at.
const MAX_REPORTED: usize = 20_000;
/// What an entry of a report takes beside its names, in bytes.
const ENTRY_BYTES: usize = 32;

/// The routers beside this one.
#[derive(Clone)]
pub struct OtherRouters {
    /// The name of this one among the members.
    pub own: String,
    /// All of them.
    pub members: Members,
}

/// Takes the reports of other routers.
pub struct AdmissionApi {
    rates: Arc<SubmissionRates>,
    clock: Arc<dyn Clock>,
    /// The name of this router among the others.
    own: String,
}

impl AdmissionApi {
    pub(crate) fn new(rates: Arc<SubmissionRates>, clock: Arc<dyn Clock>, own: String) -> Self {
        Self { rates, clock, own }
    }
}

#[tonic::async_trait]
impl AdmissionService for AdmissionApi {
    async fn report_submissions(
        &self,
        request: Request<ReportSubmissionsRequest>,
    ) -> Result<Response<ReportSubmissionsResponse>, Status> {
        let ReportSubmissionsRequest { router, admitted } = request.into_inner();
        if router.is_empty() {
            return Err(Status::invalid_argument("router: is required"));
        }
        let (router, now): (Arc<str>, _) = (router.into(), self.clock.now());
        if *router == *self.own {
            // An address of its own that it does not know as such.
            return Ok(Response::new(ReportSubmissionsResponse {}));
        }
        for AdmittedSubmissions { tenant_id, user_id, count } in
            admitted.into_iter().take(MAX_REPORTED)
        {
            let name = Name { tenant: tenant_id, user: user_id };
            self.rates.note_other(&router, &name, count, now);
        }
        Ok(Response::new(ReportSubmissionsResponse {}))
    }
}

/// Reports to the other routers what this one admitted, until `shutdown`.
pub(crate) async fn exchange(
    rates: &SubmissionRates,
    others: OtherRouters,
    shutdown: CancellationToken,
) {
    let mut ticks = interval(REPORT_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let all = others.members.all();
        let alive: Vec<&Member> =
            all.iter().filter(|member| *member.name != *others.own && member.seems_up()).collect();
        rates.note_routers(u32::try_from(alive.len() + 1).unwrap_or(u32::MAX));
        let mut admitted = rates.take_admitted();
        if admitted.is_empty() {
            continue;
        }
        admitted.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        let mut bytes = 0;
        let reported = admitted.into_iter().take_while(|(name, _)| {
            bytes += name.tenant.len() + name.user.len() + ENTRY_BYTES;
            bytes <= MAX_REPORT_BYTES
        });
        let admitted = reported.map(|(Name { tenant, user }, count)| AdmittedSubmissions {
            tenant_id: tenant,
            user_id: user,
            count,
        });
        let report =
            ReportSubmissionsRequest { router: others.own.clone(), admitted: admitted.collect() };
        join_all(alive.into_iter().map(|member| send(member, report.clone()))).await;
    }
}

/// A report that is lost is as good as one that says nothing.
async fn send(member: &Member, report: ReportSubmissionsRequest) {
    let mut client = AdmissionServiceClient::new(member.channel.clone());
    let name = &*member.name;
    match timeout(REPORT_TIMEOUT, client.report_submissions(report)).await {
        Ok(Ok(_)) => {}
        Ok(Err(status)) => tracing::debug!(%status, name, "could not report submissions"),
        Err(_) => tracing::debug!(name, "could not report submissions in time"),
    }
}
