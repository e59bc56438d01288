//! Reports of admitted submissions between routers.

use std::{sync::Arc, time::Duration};

use futures_util::future::join_all;
use streamer_cluster::{Instance, Instances};
use streamer_core::{Clock, saturate};
use streamer_proto::{
    internal::v1::{
        AdmittedSubmissions, ReportSubmissionsRequest, ReportSubmissionsResponse,
        admission_service_server::AdmissionService,
    },
    stubs::AdmissionServiceStub,
};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::{RateKey, SubmissionRates};

const REPORT_INTERVAL: Duration = Duration::from_secs(1);
const REPORT_TIMEOUT: Duration = Duration::from_secs(1);
/// Maximum size of a report, in bytes. The largest counts are included first.
const MAX_REPORT_BYTES: usize = 1024 * 1024;
/// Maximum number of entries that are read from a report.
const MAX_REPORT_ENTRIES: usize = 20_000;
/// Size of a report entry without its names, in bytes.
const ENTRY_BYTES: usize = 32;

/// This router and its peers.
#[derive(Clone)]
pub struct PeerRouters {
    /// Name of this router among the instances.
    pub own: String,
    /// All routers, including this one.
    pub instances: Instances,
}

/// Receives reports from other routers.
pub struct AdmissionApi {
    rates: Arc<SubmissionRates>,
    clock: Arc<dyn Clock>,
    /// Name of this router among the instances.
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
            // This router sent the report to itself, through an address that it does not recognise as its own.
            return Ok(Response::new(ReportSubmissionsResponse {}));
        }
        for AdmittedSubmissions { tenant_id, user_id, count } in
            admitted.into_iter().take(MAX_REPORT_ENTRIES)
        {
            let name = RateKey { tenant: tenant_id, user: user_id };
            self.rates.record_report(&router, &name, count, now);
        }
        Ok(Response::new(ReportSubmissionsResponse {}))
    }
}

/// Reports to the other routers the submissions that this router admitted, until `shutdown` is cancelled.
pub(crate) async fn exchange_reports(
    rates: &SubmissionRates,
    peers: PeerRouters,
    shutdown: CancellationToken,
) {
    let mut ticks = interval(REPORT_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let all = peers.instances.all();
        let healthy: Vec<&Instance> = all
            .iter()
            .filter(|instance| *instance.name != *peers.own && instance.is_reachable())
            .collect();
        rates.set_router_count(saturate::to_u32(healthy.len() + 1));
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
        let admitted = reported.map(|(RateKey { tenant, user }, count)| AdmittedSubmissions {
            tenant_id: tenant,
            user_id: user,
            count,
        });
        let report =
            ReportSubmissionsRequest { router: peers.own.clone(), admitted: admitted.collect() };
        join_all(healthy.into_iter().map(|instance| send(instance, report.clone()))).await;
    }
}

/// Sends a report. A lost report has the same effect as an empty one.
async fn send(instance: &Instance, report: ReportSubmissionsRequest) {
    let mut client = AdmissionServiceStub::new(instance.channel.clone());
    let name = &*instance.name;
    match timeout(REPORT_TIMEOUT, client.report_submissions(report)).await {
        Ok(Ok(_)) => {}
        Ok(Err(status)) => tracing::debug!(%status, name, "failed to report submissions"),
        Err(_) => tracing::debug!(name, "timed out reporting submissions"),
    }
}
