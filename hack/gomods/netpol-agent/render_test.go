package main

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

func pod(namespace, name, address string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: map[string]string{"app": name}},
		Spec: corev1.PodSpec{InitContainers: []corev1.Container{
			{Ports: []corev1.ContainerPort{{Name: "api", ContainerPort: 8443}}}}},
		Status: corev1.PodStatus{PodIP: address, Phase: corev1.PodRunning},
	}
}

func selector(app string) *metav1.LabelSelector {
	return &metav1.LabelSelector{MatchLabels: map[string]string{"app": app}}
}

func namespace(name string) *corev1.Namespace {
	return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"name": name}}}
}

func world(spec networkingv1.NetworkPolicySpec) string {
	return render(snapshot{
		pods:       []*corev1.Pod{pod("a", "web", "10.0.0.1"), pod("a", "db", "10.0.0.2"), pod("b", "db", "10.0.0.3")},
		namespaces: []*corev1.Namespace{namespace("a"), namespace("b")},
		policies: []*networkingv1.NetworkPolicy{
			{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "p"}, Spec: spec}},
	})
}

func TestRender(t *testing.T) {
	named, ranged, end := intstr.FromString("api"), intstr.FromInt32(80), int32(90)
	udp := corev1.ProtocolUDP
	ingress := []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}
	egress := []networkingv1.PolicyType{networkingv1.PolicyTypeEgress}
	for name, c := range map[string]struct {
		spec     networkingv1.NetworkPolicySpec
		has, not []string
	}{
		"deny all ingress": {
			networkingv1.NetworkPolicySpec{PodSelector: *selector("web"), PolicyTypes: ingress},
			[]string{"elements = { 10.0.0.1 : jump i1 }", "counter drop"},
			[]string{"10.0.0.2", "10.0.0.3"},
		},
		"pods of the policy's namespace, named port of the receiver": {
			networkingv1.NetworkPolicySpec{PodSelector: *selector("web"), PolicyTypes: ingress,
				Ingress: []networkingv1.NetworkPolicyIngressRule{{
					From:  []networkingv1.NetworkPolicyPeer{{PodSelector: selector("db")}},
					Ports: []networkingv1.NetworkPolicyPort{{Port: &named}}}}},
			[]string{"ip saddr { 10.0.0.2 } tcp dport 8443 return"},
			[]string{"10.0.0.3"},
		},
		"namespace and pod together": {
			networkingv1.NetworkPolicySpec{PodSelector: *selector("web"), PolicyTypes: egress,
				Egress: []networkingv1.NetworkPolicyEgressRule{{
					To: []networkingv1.NetworkPolicyPeer{{PodSelector: selector("db"),
						NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"name": "b"}}}},
					Ports: []networkingv1.NetworkPolicyPort{{Port: &named}}}}},
			[]string{"ip daddr { 10.0.0.3 } tcp dport 8443 return", "elements = { 10.0.0.1 : jump e1 }"},
			[]string{"10.0.0.2"},
		},
		"block with exception and a range of UDP ports": {
			networkingv1.NetworkPolicySpec{PodSelector: *selector("web"), PolicyTypes: egress,
				Egress: []networkingv1.NetworkPolicyEgressRule{{
					To: []networkingv1.NetworkPolicyPeer{{IPBlock: &networkingv1.IPBlock{
						CIDR: "0.0.0.0/0", Except: []string{"10.0.0.0/8"}}}},
					Ports: []networkingv1.NetworkPolicyPort{{Protocol: &udp, Port: &ranged, EndPort: &end}}}}},
			[]string{"ip daddr 0.0.0.0/0 ip daddr != 10.0.0.0/8 udp dport 80-90 return"}, nil,
		},
		"a selector that matches nobody allows nobody": {
			networkingv1.NetworkPolicySpec{PodSelector: *selector("web"), PolicyTypes: ingress,
				Ingress: []networkingv1.NetworkPolicyIngressRule{{
					From: []networkingv1.NetworkPolicyPeer{{PodSelector: selector("none")}}}}},
			[]string{"ip saddr 10.0.0.1 return\n\t\tcounter drop"}, nil,
		},
		"an empty rule allows everybody": {
			networkingv1.NetworkPolicySpec{PodSelector: *selector("web"), PolicyTypes: ingress,
				Ingress: []networkingv1.NetworkPolicyIngressRule{{}}},
			[]string{"\t\t return\n\t\tcounter drop"}, nil,
		},
	} {
		t.Run(name, func(t *testing.T) {
			got := world(c.spec)
			for _, text := range c.has {
				if !strings.Contains(got, text) {
					t.Errorf("missing %q in:\n%s", text, got)
				}
			}
			for _, text := range c.not {
				if strings.Contains(got, text) {
					t.Errorf("unexpected %q in:\n%s", text, got)
				}
			}
		})
	}
}
