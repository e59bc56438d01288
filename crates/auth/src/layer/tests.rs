use streamer_core::{Clock, SystemClock};

use super::*;
use crate::{DEV_AUDIENCE, DEV_ISSUER, DevKey, NewToken, TokenRules};

/// Service that never responds.
#[derive(Clone)]
struct NeverResponds;

impl Service<Request<()>> for NeverResponds {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<()>) -> Self::Future {
        let caller = request.extensions().get::<Caller>().cloned();
        Box::pin(async move {
            caller.unwrap().set_audit_subject(|| Subject::named("r"));
            std::future::pending().await
        })
    }
}

#[tokio::test]
async fn a_call_is_recorded_even_if_its_caller_disconnects() {
    let folder = tempfile::tempdir().unwrap();
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let key = DevKey::load_or_create(folder.path()).unwrap();
    let token = NewToken {
        user: "ann".into(),
        tenant: "acme".into(),
        permissions: Vec::new(),
        expires_in: Duration::from_secs(60),
    };
    let token = key.sign(&token, clock.now()).unwrap();
    let rules = TokenRules {
        issuers: vec![DEV_ISSUER.into()],
        audiences: vec![DEV_AUDIENCE.into()],
        ..TokenRules::default()
    };
    let keys = vec![key.verification_key().unwrap()];
    let authenticator = Arc::new(Authenticator::new(keys, None, rules, clock.clone()));
    let path = folder.path().join("audit.jsonl");
    let audit = Audit::open(&path, clock, || panic!("no record may be dropped")).unwrap();
    let mut service = AuthLayer::new(authenticator, audit.clone()).wrap(NeverResponds);
    for _ in 0..2 {
        let request = Request::post("/streamer.router.v1.RouterService/Cancel")
            .header(AUTHORIZATION, format!("Bearer {token}"));
        let mut call = Box::pin(service.call(request.body(()).unwrap()));
        assert!(futures_util::poll!(&mut call).is_pending());
    }
    audit.flush(Duration::from_secs(60));
    let text = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text.lines().count(), 2, "{text}");
    for line in text.lines() {
        let record: serde_json::Value = serde_json::from_str(line).unwrap();
        let values = ["outcome", "user", "subject"].map(|name| record[name].as_str().unwrap());
        assert_eq!(values, ["CANCELLED", "ann", "r"]);
    }
}

#[test]
fn unaudited_methods_exist_and_all_others_are_audited() {
    let methods: Vec<_> = public_methods().into_iter().map(|method| method.path).collect();
    for unaudited in UNAUDITED {
        assert!(methods.iter().any(|path| path.ends_with(&format!(".{unaudited}"))), "{unaudited}");
    }
    let audited = METHODS.iter().filter(|(_, rules)| rules.is_audited);
    let mut audited: Vec<_> = audited.map(|(path, _)| path.rsplit('.').next().unwrap()).collect();
    audited.sort_unstable();
    assert_eq!(
        audited,
        [
            "AdminService/Backup",
            "ConnectionsService/Broadcast",
            "ConnectionsService/Disconnect",
            "ConnectionsService/Send",
            "Operations/CancelOperation",
            "Operations/DeleteOperation",
            "RouterService/Cancel",
            "RouterService/Redrive",
            "RouterService/RedriveMany",
        ]
    );
}
