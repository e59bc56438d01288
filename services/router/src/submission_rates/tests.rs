//! Tests of the rates of one router and of several routers.

use std::collections::HashMap;

use tonic::Code;
use tonic_types::StatusExt;

use super::*;

fn principal(tenant: &str, user: &str) -> Principal {
    Principal {
        tenant: tenant.into(),
        user: user.into(),
        permissions: Vec::new(),
        expires_at: Timestamp::default(),
    }
}

fn limits(of_tenant: u64, of_user: u64) -> TenantLimits {
    TenantLimits::new(|limit| match limit {
        TenantLimit::SubmissionsPerTenant => of_tenant,
        TenantLimit::SubmissionsPerUser => of_user,
        _ => 0,
    })
}

#[test]
fn users_and_tenants_have_separate_rates() {
    let by_tenant = LimitsByTenant::new(limits(3, 2), HashMap::new());
    let rates = SubmissionRates::new(by_tenant.clone());
    let at = Timestamp::from_millis;
    let admitted_at = |millis, tenant, user| {
        (0..10).filter(|_| rates.admit(&principal(tenant, user), at(millis)).is_ok()).count()
    };
    let admitted = |tenant, user| admitted_at(0, tenant, user);
    assert_eq!(admitted("acme", "ann"), 4);
    assert_eq!(admitted("acme", "bob"), 2, "the rest of the tenant's rate");
    assert_eq!(admitted("globex", "ann"), 4);
    let error = rates.admit(&principal("acme", "ann"), at(0)).unwrap_err();
    assert_eq!(error.code(), Code::ResourceExhausted);
    assert!(error.message().contains("limits.submissions_per_second_per_user"));
    assert!(error.get_details_retry_info().is_some());
    assert!(rates.admit(&principal("acme", "ann"), at(1000)).is_ok());
    let of_acme = HashMap::from([("acme".to_owned(), limits(1000, 500))]);
    by_tenant.replace(limits(3, 2), of_acme);
    assert_eq!(admitted_at(3000, "acme", "bob"), 10);
    assert_eq!(admitted_at(3000, "globex", "ann"), 4);
}

#[test]
fn zero_means_no_limit() {
    let rates = SubmissionRates::new(LimitsByTenant::default());
    let admit = || rates.admit(&principal("acme", "ann"), Timestamp::default()).is_ok();
    assert!((0..100_000).all(|_| admit()));
}

#[test]
fn a_router_admits_the_unused_rate_and_at_least_an_equal_part() {
    let rates = SubmissionRates::new(LimitsByTenant::new(limits(0, 100), HashMap::new()));
    let at = Timestamp::from_millis;
    let ann = RateKey { tenant: "acme".into(), user: "ann".into() };
    let share = |millis| get_or_create(&rates.users, &ann).lock().share(100, 4, at(millis));
    assert_eq!(share(0), 100);
    let (second, third): (Arc<str>, Arc<str>) = ("second".into(), "third".into());
    rates.record_report(&second, &ann, 30, at(1000));
    rates.record_report(&third, &ann, 20, at(1000));
    assert_eq!(share(1000), 50);
    rates.record_report(&second, &ann, 99, at(2000));
    assert_eq!(share(2000), 25);
    // The highest report is valid for 10 s.
    rates.record_report(&second, &ann, 10, at(5000));
    rates.record_report(&third, &ann, 10, at(5000));
    assert_eq!((share(10_999), share(11_000), share(12_000)), (25, 25, 100));
    rates.record_report(&second, &ann, 10, at(12_000));
    assert_eq!(share(12_000), 90);
}

#[test]
fn only_counts_above_the_threshold_are_reported_and_only_with_other_routers() {
    let rates = SubmissionRates::new(LimitsByTenant::new(limits(1000, 100), HashMap::new()));
    let submit = |user: &str, count| {
        for _ in 0..count {
            rates.admit(&principal("acme", user), Timestamp::from_millis(1000)).unwrap();
        }
    };
    submit("ann", 50);
    assert_eq!(rates.take_admitted(), []);
    rates.set_router_count(2);
    submit("ann", 10);
    submit("bob", 6);
    let of_ann = (RateKey { tenant: "acme".into(), user: "ann".into() }, 10);
    assert_eq!(rates.take_admitted(), [of_ann]);
    submit("bob", 70);
    let mut admitted: Vec<_> =
        rates.take_admitted().into_iter().map(|(name, _)| name.user).collect();
    admitted.sort();
    assert_eq!(admitted, ["", "bob"]);
    assert_eq!(rates.take_admitted(), []);
    let error = (0..200)
        .find_map(|_| rates.admit(&principal("acme", "bob"), Timestamp::from_millis(1000)).err());
    assert!(error.unwrap().message().contains("more than 100 submissions a second"));
}
